import os

import pytest

from jaxllm.training.lock import run_lock


def test_one_process_at_a_time(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(ValueError, match=rf"in use by another process \(pid {os.getpid()} on .*choose another `out`"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):
        pass
