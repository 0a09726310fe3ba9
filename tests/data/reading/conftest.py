"""What the tests of reading share: documents, their texts, and what is left of broken input."""

import json

import pytest

from jaxllm.data.problems import Problems
from jaxllm.data.reading.sources import documents


@pytest.fixture
def read():
    """Return all documents of a source; by default any problem is an error."""
    return lambda source, problems=None: list(documents(source, problems or Problems()))


@pytest.fixture
def texts(read):
    """Return the texts of a source."""
    return lambda source, problems=None: [each.text for each in read(source, problems)]


@pytest.fixture
def skipped(read):
    """Return the documents left by "skip", which counts them, where "error" stops with a message that matches."""

    def left(source, match):
        with pytest.raises(ValueError, match=match):
            read(source)
        problems = Problems("skip")
        found = read(source, problems)
        assert problems.count >= 1
        return found

    return left


@pytest.fixture
def lines():
    """Return so many JSON lines, numbered."""
    return lambda count: b"".join(
        json.dumps({"text": f"row {n} 你好", "id": f"x{n}"}).encode() + b"\n" for n in range(count)
    )
