"""The same texts in every format that a source can have, for the tests of reading them and of packing them."""
import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_table(texts: list[str], file: str | Path, field: str = "text") -> None:
    """Texts as a Parquet file of one column."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({field: texts}), file)


def write_every_format(texts: list[str], folder: str | Path = ".") -> list[str]:
    """The names of what was written: a file in each format, a folder of two kinds of files, a copy of a data set in the hub's layout."""
    folder, half = Path(folder), len(texts) // 2
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines), "utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    with open(folder / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    write_table(texts, folder / "d.parquet")
    (folder / "e.txt").write_text("<|endoftext|>".join(texts), "utf-8")
    (folder / "folder").mkdir()
    (folder / "folder/one.jsonl").write_text("".join(lines[:half]), "utf-8")
    (folder / "folder/two.txt").write_text("<|endoftext|>".join(texts[half:]), "utf-8")
    for number, part in enumerate((texts[:half], texts[half:])):
        write_table(part, folder / f"copy/data/train-{number:05d}-of-00002.parquet")
    return ["a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e.txt", "folder", "copy"]
