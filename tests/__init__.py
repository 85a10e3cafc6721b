"""A package, so that no other distribution's stray `tests` can take its name."""

import pytest

pytest.register_assert_rewrite("tests.kit")  # its assertions show values, as those of tests do
