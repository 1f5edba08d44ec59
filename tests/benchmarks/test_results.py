"""The rows of docs/results.md: each is a run of its own, and changes settings that its recipe has."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.results import SECTIONS, folders_of, main, tables
from pipeline.config import merge
from pipeline.recipes import RECIPES

ROWS = [row for rows in SECTIONS.values() for row in rows]
TWICE = {"float16: `infonce`", "global space alone: `infonce`"}  # a section's first row may be another section's row


def settings(row):
    flags = iter(row.flags())
    return merge(RECIPES[row.method].config, {flag.removeprefix("--"): next(flags) for flag in flags}, row.name)


def test_every_row_has_a_folder_and_settings_of_its_own():
    rows = [row for row in ROWS if row.name not in TWICE]
    folders = [folder for row in rows for folder in folders_of(row, 3, Path("runs"))]
    assert len(set(folders)) == len(folders)
    assert max(len(folder.name) for folder in folders) < 200
    configs = [settings(row) for row in rows if not row.joined]
    assert all(one != other for number, one in enumerate(configs) for other in configs[:number])


def test_every_method_is_measured():
    assert {row.method for row in ROWS} == set(RECIPES)


@pytest.mark.parametrize("method", ["sede-vse", "sede-scan", "sede-vsrn"])
def test_single_modules_keep_the_recipes_values(method):
    rows = {row.name: settings(row).train.objective for row in ROWS if row.method == method}
    whole = RECIPES[method].config.train.objective
    bare = rows["host alone, InfoNCE"]
    assert (bare.erasing.weight, bare.bank.size, bare.infonce.hardness) == (0, 0, 0)
    assert rows["+ erasing"].erasing == whole.erasing
    assert rows["+ memory bank"].bank == whole.bank
    assert rows["+ weighted InfoNCE"].infonce == whole.infonce
    assert rows[f"all: `{method}`"] == whole
    for name, parts in (("+ erasing", 1), ("+ memory bank", 1), ("+ weighted InfoNCE", 1), (f"all: `{method}`", 3)):
        objective = rows[name]
        assert sum(map(bool, (objective.erasing.weight, objective.bank.size, objective.infonce.hardness))) == parts


def test_a_section_that_is_not_asked_for_keeps_its_table(tmp_path):
    standing = "\n\n### HIER\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n### A section of the past\n\n| c |\n\n"
    found = list(tables(Namespace(seeds=3, runs=tmp_path, only="a title that no section has"), standing))
    assert "\n".join(found) == "\n### HIER\n\n| a | b |\n|---|---|\n| 1 | 2 |"


def test_a_word_that_no_title_holds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results.py", "--root", "photographs", "--only", "vsrm"])
    with pytest.raises(SystemExit):
        main()
    assert "--only vsrm: no section's title holds it; there are Baselines, " in capsys.readouterr().err
