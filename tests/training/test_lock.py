import os

import pytest

from jaxllm.training.lock import RunLock


def test_one_process_at_a_time(tmp_path):
    with (
        RunLock(tmp_path),
        pytest.raises(ValueError, match=rf"in use by another process \(pid {os.getpid()} on .*choose another `out`"),
        RunLock(tmp_path),
    ):
        pass
    with RunLock(tmp_path):
        pass
