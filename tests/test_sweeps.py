"""A group of one process, and what was compiled, do not outlive their job of a sweep."""

import os

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.distributed import destroy_process_group, init_process_group, is_initialized

from bimamba.sweeps import alone_again


@pytest.mark.parametrize("launched", [False, True])
def test_a_group_of_one_process_ends_with_its_job(tmp_path, monkeypatch, launched):
    """Unless it is not the job's: `LOCAL_RANK` is there before where a launcher started the process."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1234")  # as the user set it
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="failed"), alone_again():
        monkeypatch.setenv("LOCAL_RANK", "0")
        init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        raise RuntimeError("a job that failed")
    assert is_initialized() == ("LOCAL_RANK" in os.environ) == launched and os.environ["MASTER_PORT"] == "1234"
    if launched:
        destroy_process_group()


def test_compiled_graphs_end_with_their_job():
    def double(x):
        return 2 * x

    with alone_again():
        torch.compile(double, backend="eager")(torch.ones(1))
        assert len(_debug_get_cache_entry_list(double.__code__)) == 1
    assert not _debug_get_cache_entry_list(double.__code__)
