"""Optional packages: what to say where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say how to install the extra `name` of jaxllm, should an import inside the block find nothing.

    Raises:
      ValueError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; run: pip install 'jaxllm[{name}]'") from error
