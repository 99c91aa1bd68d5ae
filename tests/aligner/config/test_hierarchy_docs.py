"""Every override and file in docs/hierarchy.md and the README does what it is said to do, and passes `--check`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemo_fiberpo.aligner.config.checks import check_sections
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.objective import Budget, Hierarchy, SlopeCap
from tests.support.launching import ROOT, check_each

README = (ROOT / "README.md").read_text().replace("\\\n", "")
SECTION = re.search(
    r"\n## Changing a hierarchy, and replacing it\n(.*?)\n## ", (ROOT / "docs/hierarchy.md").read_text(), re.S
)
ROW = re.compile(r"^\| ([^|]*) \| `([^`]*)` \|$", re.M)
BLOCK = re.compile(r"```yaml\n# conf/(\S+\.yaml)[^\n]*\n(.*?)```", re.S)
assert SECTION is not None
OVERRIDES = {meaning: shlex.split(written)[0] for meaning, written in ROW.findall(SECTION[1])}
FILES = dict(BLOCK.findall(SECTION[1]))


def summary(hierarchy: Hierarchy) -> list[str]:
    """Name and budgets of every stratum, coarsest first."""
    return [f"{stratum.name} {stratum.budget.pos:g} {stratum.budget.neg:g}" for stratum in hierarchy.strata]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def loaded(config: str, *overrides: str) -> Hierarchy:
    return check_sections(compose(config, ["run_dir=/nowhere", *overrides]))[0]


def test_the_training_script_takes_every_line_and_file(conf: Path):
    commands = [["--config-name", "quickstart", override] for override in OVERRIDES.values()]
    commands += [["--config-name", Path(name).stem] for name in FILES if "/" not in name]
    commands += [["--config-name", "quickstart", f"hierarchy={Path(name).stem}"] for name in FILES if "/" in name]
    readme = re.findall(r"^bash examples/quickstart\.sh (.*hierarchy.*)$", README, re.M)
    commands += [["--config-name", "quickstart", *shlex.split(given)] for given in readme]
    assert len(OVERRIDES) == 8 and len(FILES) == 5 and len(readme) == 3
    found, warnings = check_each(
        [[*command[:2], "--config-dir", str(conf), f"run_dir={conf}", *command[2:]] for command in commands]
    )
    assert found == ["fine"] * len(commands), found
    assert not warnings, "none of them is warned about"


def test_the_overrides_do_what_is_documented():
    start = ["domain 0.04 0.03", "prompt_group 0.08 0.06", "trajectory 0.24 0.12"]
    found = {meaning: loaded("quickstart", override) for meaning, override in OVERRIDES.items()}
    assert summary(loaded("quickstart")) == start
    assert summary(found["change a value"]) == ["domain 0.06 0.03", *start[1:]]
    assert found["set a key that the file leaves out"].strata[0].slope == 16
    assert found["give a cell a budget of its own"].strata[0].budgets == {"code": Budget(0.06, 0.04)}
    assert [stratum.name for stratum in found["switch a stratum off"].active] == ["prompt_group", "trajectory"]
    assert summary(found["switch a stratum off"]) == start
    assert summary(found["take a stratum out"]) == start[1:]
    assert summary(found["add a stratum, as the finest"]) == [*start, "turn 0.3 0.2"]
    assert summary(found["replace the strata"]) == ["trajectory 0.24 0.12"]
    assert found["replace the strata"].strata[0].slope is None, "the cap of the file is not merged in"
    assert summary(found["take another file"]) == ["trajectory 0.12 0.05"]
    assert len(found) == 8


def test_the_files_do_what_is_documented(conf: Path):
    found = {name: loaded(str(conf / name)) for name in FILES if "/" not in name}
    merged = found["my_run.yaml"]
    assert summary(merged) == ["domain 0.06 0.03", "prompt_group 0.08 0.06", "trajectory 0.24 0.12"]
    assert [stratum.name for stratum in merged.active] == ["domain", "trajectory"]
    assert merged.strata[2].slope == SlopeCap(32)
    replaced = ["language 0.015 0.01", "domain 0.02 0.015", "trajectory 0.12 0.05"]
    assert summary(found["my_other_run.yaml"]) == replaced
    assert summary(found["my_short_run.yaml"]) == ["domain 0.04 0.03", "trajectory 0.24 0.12"]
    assert found["my_short_run.yaml"].strata[1].slope is None
    assert summary(loaded(str(conf / "my_run.yaml"), "hierarchy=wide_domains"))[0] == "domain 0.06 0.015"
    wide = loaded(str(conf / "my_other_run.yaml"), "hierarchy=wide_domains")
    assert summary(wide) == ["domain 0.06 0.015", "prompt_group 0.04 0.03", "trajectory 0.12 0.05"]
    assert {Path(name).stem for name in FILES} == {
        "my_run", "wide_domains", "my_domains", "my_other_run", "my_short_run"
    }  # fmt: skip


def test_the_readme_s_hierarchy_is_read(tmp_path: Path):
    ((name, text),) = [(name, text) for name, text in BLOCK.findall(README) if name.startswith("hierarchy/")]
    (tmp_path / "hierarchy").mkdir()
    (tmp_path / name).write_text(text)
    (tmp_path / "mine.yaml").write_text(f"defaults: [quickstart, {{override hierarchy: {Path(name).stem}}}, _self_]\n")
    hierarchy = loaded(str(tmp_path / "mine.yaml"))
    assert summary(hierarchy) == ["domain 0.02 0.015", "prompt_group 0.04 0.03", "trajectory 0.12 0.05"]
    assert hierarchy.strata[0].budgets == {"code": Budget(0.03, 0.02)}
