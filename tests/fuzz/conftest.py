"""Two ways to look for bad inputs: the same ones every time, or new ones.

pytest -m slow tests/fuzz
pytest -m slow tests/fuzz --hypothesis-profile=search
"""

from hypothesis import HealthCheck, Phase, settings

_BOTH = settings(
    deadline=None,  # tests/kit/guard.py has one, in processor time
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    database=None,
)
settings.register_profile("fixed", _BOTH, derandomize=True, max_examples=20)
settings.register_profile("search", _BOTH, max_examples=200)
settings.load_profile("fixed")
