import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxllm.training.metrics import MetricsWriter, read


def test_records_survive_and_later_steps_are_dropped_on_resume(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.metrics(step, {"loss": 1 / step})
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "loss": 0.2')  # a line that a kill cut short
    writer = MetricsWriter(tmp_path, resume_from=2)
    writer.metrics(3, {"loss": 1 / 3})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage", [b"\0\0\0", b'{"step": 2, "lo', b"[1]", b'{"loss": 1.0}', b'{"step": 2, "text": "\xff"}']
)
def test_a_damaged_line_is_named(tmp_path, damage):
    (tmp_path / "timing.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"timing.jsonl, line 2 is damaged: .*; delete this line"):
        MetricsWriter(tmp_path, resume_from=1)


def test_nan_is_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.metrics(1, {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": "nan", "grad_norm": "inf"}]


def test_samples_with_line_separators_stay_one_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.sample(1, "a\u2028b", "c\nd\x85")
    writer.close()
    assert read(tmp_path / "samples.jsonl")[0]["text"] == "c\nd\x85"


def scalars(run_dir):
    """The steps that TensorBoard shows: a session start hides what was written before from its step on."""
    shown = []
    for file in sorted((run_dir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.HasField("session_log"):
                shown = [(step, value) for step, value in shown if step < event.step]
            shown += [(event.step, each.simple_value) for each in event.summary.value if each.tag == "loss"]
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.metrics(step, {"loss": 1.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name("events.out.tfevents.0"))  # its name is the second in which it was made
    writer = MetricsWriter(tmp_path, resume_from=2)
    writer.metrics(3, {"loss": 2.0})
    writer.close()
    assert scalars(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]
