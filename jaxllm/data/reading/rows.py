"""Readers of files and data sets whose documents are rows with named fields: JSON lines, Parquet, ArrayRecord, TFDS."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from jaxllm.core.extras import extra
from jaxllm.data.problems import Problems, as_json
from jaxllm.data.reading.input_files import is_archive, lines, open_file, streams

if TYPE_CHECKING:
    from jaxllm.data.reading.sources import Part, RowFiles, Tfds

BATCH = 256  # rows held in memory
EXAMPLES = 1 << 16  # of a TFDS split, in one part
_json = json.JSONDecoder().decode


class Row(NamedTuple):
    """One row: `place` names it in a message, `location` and `offset` as in `Document`."""

    place: str
    location: str
    offset: int | None
    values: dict


def read(part: "Part", problems: Problems, fields: list[str] | None) -> Iterator[Row]:
    """Yield the rows of one part.

    Args:
      fields: the only ones that are needed, where others would cost time; a record of ArrayRecord that is text and no
        JSON has it in the field "text". None: all.
    """
    kind = part.source.kind
    if kind in ("parquet", "arrayrecord") and is_archive(part.path):
        problems.report(f"{part.path}: files of --{kind} cannot be read inside an archive; unpack it")
        return
    match kind:
        case "jsonl":
            for file, prefix, content in streams(part, problems):
                yield from problems.guard(file, _json_lines(content, part.source, problems, file, prefix))
        case "parquet":
            yield from problems.guard(part.path, _parquet(part, fields, problems))
        case "arrayrecord":
            plain = fields is not None and part.source.fields is None
            yield from problems.guard(part.path, _array_record(part, plain, problems))
        case "hf":
            yield from problems.guard(part.path, _arrow(part.path))
        case "tfds":
            yield from problems.guard(part.path, _tfds(part))


def _json_lines(content: BinaryIO, source: "RowFiles", problems: Problems, file: str, prefix: str) -> Iterator[Row]:
    limit = source.max_bytes
    for number, offset, size, data in lines(content, limit):
        place = f"{file}:{number}"
        if size > limit:
            problems.report(
                f"{place}: a line of {size:,} bytes, and max_bytes of this input is {limit:,}; set it higher"
            )
            continue
        text = problems.decode(data, place, offset, source.encoding)
        if text is not None and not text.isspace():
            row = problems.attempt(place, _object, text.removeprefix("\ufeff"))
            if row is not None:
                yield Row(place, f"{prefix}line {number}", offset, row)


def _object(text: str) -> dict:
    try:
        row = _json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        advice = "; of a file that is one list, jq -c '.[]' FILE makes lines" * isinstance(row, list)
        raise ValueError(f"a row must be a JSON object, found {as_json(row, 40)}{advice}")
    return row


def _numbered(path: str, word: str, values: Iterable[dict], start: int = 0) -> Iterator[Row]:
    for number, value in enumerate(values, start):
        yield Row(f"{path}, {word} {number}", f"{word} {number}", None, value)


def count_groups(path: str, kind: str) -> int:
    """Return in how many parts a file can be read: row groups of Parquet, records of ArrayRecord; 1: it is broken."""
    with extra("prep"):
        import pyarrow
        from pyarrow.parquet import ParquetFile
    if kind == "arrayrecord":
        return max(1, _record_reader(path).num_records())
    with suppress(pyarrow.ArrowException, OSError), open_file(path) as stream:
        return max(1, ParquetFile(stream).num_row_groups)
    return 1


def _parquet(part: "Part", fields: list[str] | None, problems: Problems) -> Iterator[Row]:
    """One row group after the other, and of each a buffer only; a broken one is left out."""
    with extra("prep"):
        import pyarrow
        from pyarrow.parquet import ParquetFile
    path = part.path
    with open_file(path) as stream:
        try:
            file = ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        except pyarrow.ArrowException as error:
            raise OSError(f"no whole Parquet file ({error})") from error
        names = file.schema_arrow.names
        if fields and fields[0] not in names:
            if part.first:
                return  # which the part before says
            raise OSError(f"no column {fields[0]!r}; there are {', '.join(map(repr, names))}")
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in part.share(len(counts)):
            start, count = sum(counts[:group]), counts[group]
            batches = file.iter_batches(BATCH, [group], fields)
            try:
                yield from _numbered(path, "row", chain.from_iterable(map(_rows, batches)), start)
            except (pyarrow.ArrowException, OSError) as error:
                problems.report(f"{path}: row group {group} (rows {start} to {start + count - 1}) is broken ({error})")


def _rows(batch) -> list[dict]:
    """The rows of an Arrow batch; texts as bytes, so that one which is not UTF-8 is a problem of its row alone."""
    for number, field in enumerate(batch.schema):
        if str(field.type) in ("string", "large_string"):
            kind = str(field.type).replace("string", "binary")
            batch = batch.set_column(number, field.name, batch.column(number).cast(kind))
    batch.validate(full=True)  # else a damaged file could end the process
    return batch.to_pylist()


def _arrow(path: str) -> Iterator[Row]:
    """A file of a directory that `Dataset.save_to_disk` of Hugging Face datasets made."""
    with extra("prep"):
        import pyarrow
    try:
        with open_file(path) as stream, pyarrow.ipc.open_stream(stream) as batches:
            slices = (batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH))
            yield from _numbered(path, "row", chain.from_iterable(map(_rows, slices)))
    except pyarrow.ArrowException as error:
        raise OSError(f"no whole Arrow file ({error})") from error


def arrow_files(directory: str) -> list[str]:
    """Return the files of a directory of `Dataset.save_to_disk`, in order.

    Raises:
      FileNotFoundError: it is no such directory.
      ValueError: it has several splits.
    """
    known = {}
    for name in ("state", "dataset_dict"):
        with suppress(FileNotFoundError, NotADirectoryError), open_file(f"{directory}/{name}.json") as file:
            known |= json.load(file)
    if "splits" in known:
        raise ValueError(
            f"{directory} has splits; name one: {', '.join(f'{directory}/{each}' for each in known['splits'])}"
        )
    if "_data_files" not in known:
        raise FileNotFoundError(f"{directory} is not what save_to_disk of Hugging Face datasets makes (no state.json)")
    return [f"{directory}/{each['filename']}" for each in known["_data_files"]]


def tfds_data(source: "Tfds") -> Sequence[dict]:
    """Open a prepared TFDS data set, without TensorFlow.

    Raises:
      ValueError: there is no such name, version or split, or its files are not prepared for random access.
    """
    with extra("prep"):
        import tensorflow_datasets as tfds
    try:
        return tfds.data_source(source.name, split=source.split, data_dir=source.data_dir, download=False)
    except (ValueError, KeyError, AssertionError, NotImplementedError, OSError, ImportError) as error:
        raise ValueError(
            f"--tfds {source.name}, split {source.split!r}, in {source.data_dir or 'the default data_dir'}: "
            f"{str(error).splitlines()[0].rstrip('.')}; prepare it with file_format='array_record'"
        ) from error


def _tfds(part: "Part") -> Iterator[Row]:
    data = tfds_data(part.source)
    for start in range(part.first, part.stop, BATCH):
        batch = data.__getitems__(range(start, min(start + BATCH, part.stop)))
        yield from _numbered(part.path, "example", batch, start)


def _record_reader(path: str):
    with extra("prep"):
        from array_record.python.array_record_module import ArrayRecordReader
    return ArrayRecordReader(path)


def _array_record(part: "Part", plain: bool, problems: Problems) -> Iterator[Row]:
    path, reader = part.path, _record_reader(part.path)
    if not reader.ok():
        reader.read([0])  # says why
    share = part.share(reader.num_records())
    for start in share[::BATCH]:
        for number, record in enumerate(_records(reader, start, min(start + BATCH, share.stop), path, problems), start):
            place = f"{path}, record {number}"
            text = None if record is None else problems.decode(record, place, 0)
            if text is not None:
                row = {"text": text} if plain else problems.attempt(place, _object, text)
                if row is not None:
                    yield Row(place, f"record {number}", None, row)


def _records(reader, start: int, stop: int, path: str, problems: Problems) -> Iterator[bytes | None]:
    try:
        yield from reader.read(start, stop)
        return
    except RuntimeError:
        pass
    for number in range(start, stop):  # some of them are broken
        try:
            yield reader.read([number])[0]
        except RuntimeError as error:
            problems.report(f"{path}, record {number}: {error}")
            yield None
