"""What a stopped merge has kept, damaged: that part is made again, and nothing else is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.host.resume import _before, _changed
from mergekit_dam.journal import Journal
from tests.kit.damage import changed_json, changed_safetensors
from tests.kit.guard import guarded

pytestmark = pytest.mark.slow

STATE = {"part": 3, "tensors": [torch.ones(2, 3)], "trials": [{"name": "start", "kl": 0.5}]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("kept")
    Journal(folder).put("key", STATE, said="half")
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@given(data=st.data())
def test_a_state_is_given_back_as_it_was_or_not_at_all(kept: bytes, data: st.DataObject) -> None:
    content = data.draw(changed_safetensors(kept))
    with guarded() as folder:
        (folder / "key.safetensors").write_bytes(content)
        journal = Journal(folder)
        assert isinstance(journal.said, str)
        found = journal.get("key")
        if found is not None:
            assert found["part"] == 3
            assert found["trials"] == STATE["trials"]
            assert found["tensors"][0].shape == (2, 3)


@given(content=changed_json({"`samples`": "4", "the device": "cpu"}))
def test_the_list_of_what_states_depend_on(kept: bytes, content: bytes) -> None:
    with guarded() as folder:
        (folder / "key.safetensors").write_bytes(kept)
        (folder / "depends_on.json").write_bytes(content)
        before = _before(folder)
        assert before is not None
        assert isinstance(_changed(before, {"`samples`": "4"}), str)
