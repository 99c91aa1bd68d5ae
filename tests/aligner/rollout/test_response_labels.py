"""`token_labels` in the aligner: what is checked before training, what rollouts of several ranks become, entropy."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from nemo_fiberpo.aligner.checkpoint.identity import hierarchy_of_record, identity_of, identity_of_record
from nemo_fiberpo.aligner.config.sections import hierarchy_section
from nemo_fiberpo.aligner.rollout.response_labels import ResponseLabels
from nemo_fiberpo.aligner.rollout.strata import StrataLabels
from nemo_fiberpo.cli.compose import compose
from nemo_fiberpo.config import load_hierarchy, load_token_labels
from nemo_fiberpo.diagnostics.entropy import entropy_metrics
from nemo_fiberpo.labelling.token_labels import IGNORED, PREFIX
from tests.labelling.tokenizers import Bytes
from tests.support.launching import ROOT

BUDGET = {"pos": 0.1, "neg": 0.1}
FILES = ("think_answer", "turns", "time", "tool_branch")


class Prompts:
    """What is asked of a `PromptDataset`: four prompts of two domains."""

    first_index = 0

    def __init__(self, **strata: str):
        self.records = [
            SimpleNamespace(
                prompt="p", response="12", domain="code" if place % 2 else "math", strata=strata, where=f"f:{place}"
            )
            for place in range(4)
        ]

    def __len__(self):
        return 4

    def label_names(self, name, optional=False):
        assert name == "domain"
        return ["code", "math"]

    def label_table(self, name, optional=False):
        return torch.tensor([1, 0, 1, 0])


def strata_of(cfg, prompts: Prompts | None = None) -> StrataLabels:
    labels = load_token_labels(cfg)
    assert labels is not None
    return StrataLabels(load_hierarchy(cfg), prompts or Prompts(), of_tokens=labels.cells)


def hierarchy(source, **strata):
    chain = {"domain": {"budget": BUDGET}, "trajectory": {"budget": BUDGET}}
    chain |= strata or {"inside": {"join": ["trajectory", "own"], "budget": BUDGET}}
    return {"token_clip": 0.1, "strata": chain, "token_labels": {"own": source}}


@pytest.mark.parametrize("name", FILES)
def test_the_ready_hierarchies_are_checked_against_the_prompts(name):
    strata = strata_of(ROOT / f"conf/hierarchy/{name}.yaml")
    strata.check()
    [column] = strata.of_tokens
    assert strata.names[column] == strata.of_tokens[column]
    assert strata.names["domain"] == ["code", "math"]


def test_a_misspelt_cell_and_a_misspelt_column_are_refused_before_training():
    bins = {"bins": [0, 4]}
    misspelt = {"join": ["domain", "own"], "budget": BUDGET, "budgets": {"math/4-edn": BUDGET}}
    chain = {"trajectory": None, "both": misspelt}
    cfg = hierarchy(bins, **chain)
    del cfg["strata"]["trajectory"]
    with pytest.raises(ValueError, match=r"budgets\.math/4-edn: no cell .* did you mean 'math/4-end'"):
        strata_of(cfg).check()
    with pytest.raises(ValueError, match=r"token_labels\.own: no stratum .* did you mean 'onw'"):
        load_token_labels(hierarchy(bins, inside={"join": ["trajectory", "onw"], "budget": BUDGET}))


def test_budgets_by_name_need_names_that_are_known():
    own = {"budget": BUDGET, "budgets": {"digit": BUDGET}}
    cfg = {"token_clip": 0.1, "strata": {"own": own}, "token_labels": {"own": "tests.support.own_labels:kinds"}}
    with pytest.raises(ValueError, match=r"stratum 'own', budgets: .* list them in token_labels\.own\.names"):
        strata_of(cfg).check()
    cfg["token_labels"] = {"own": {"function": "tests.support.own_labels:kinds", "names": ["digit", "code", "math"]}}
    strata_of(cfg).check()


def test_a_column_has_one_origin():
    labels = load_token_labels(hierarchy({"bins": [0, 4]}))
    with pytest.raises(ValueError, match=r"^f:0: strata\.own: hierarchy\.token_labels has a column of that name"):
        ResponseLabels(labels, Bytes(), Prompts(own="x"))


def test_a_function_of_the_wrong_length_is_refused_before_training():
    labels = load_token_labels(hierarchy("tests.support.own_labels:too_few"))
    with pytest.raises(
        ValueError, match=r"^hierarchy\.token_labels\.own\.function: .* 1 labels for the 2 tokens .* to f:0"
    ):
        ResponseLabels(labels, Bytes(), Prompts())


def sample(*responses: str, prompts: list[int]) -> dict[str, torch.Tensor]:
    rows = [f"p{text}".encode().ljust(8) for text in responses]
    return {
        "response_tokens": torch.tensor([list(row) for row in rows]),
        "prompt_lengths": torch.ones(len(rows), dtype=torch.int64),
        "response_lengths": torch.tensor([1 + len(text) for text in responses]),
        "prompt_index": torch.tensor(prompts),
    }


def test_ranks_that_find_other_names_agree():
    cfg = hierarchy("tests.support.own_labels:kinds") | {"ignore": ["[", "]"]}
    ranks = [ResponseLabels(load_token_labels(cfg), Bytes(), Prompts()) for _ in range(2)]
    batches = [[sample("1a", "b[1]2", prompts=[0, 2])], [sample("x1", prompts=[1]), sample("11", prompts=[0])]]
    for rank, of_rank in zip(ranks, batches, strict=True):
        for batch in of_rank:
            rank.add_to(batch)
    told = [rank.names for rank in ranks]
    assert told == [{"own": ["digit", "math"]}, {"own": ["code", "digit"]}]
    agreed = [rank.agree(of_rank, told) for rank, of_rank in zip(ranks, batches, strict=True)]
    assert agreed == [{"own": ["code", "digit", "math"]}] * 2
    labels = [row for of_rank in batches for batch in of_rank for row in batch[PREFIX + "own"].tolist()]
    assert [row[:2] for row in labels] == [[1, 2], [2, 2], [0, 1], [1, 1]] and labels[1][:5] == [2, 2, 1, 2, 1]
    assert batches[0][0][IGNORED][1].tolist() == [0, 1, 1, 1, 0, 0, 0]
    strata = strata_of(cfg)
    strata.of_rollout = agreed[0]
    assert strata.names["own"] == ["code", "digit", "math"]
    assert torch.equal(strata.labels(batches[0][0] | {"trajectory": torch.arange(2)})["own"], torch.tensor(labels[:2]))
    assert ranks[0].names == {"own": []}, "the next rollout begins anew"


def test_entropy_by_label_is_that_of_its_tokens():
    columns = {
        "mask": torch.tensor([[True, True, True, False]]),
        "logprobs": torch.tensor([[-1.0, -2.0, -6.0, -torch.inf]]),
        PREFIX + "own": torch.tensor([[0, 2, 2, 1]], dtype=torch.int32),
    }
    names = {"domain": ["x"], "own": ["a", "b", "c"]}
    found = {key: float(value) for key, value in entropy_metrics(columns, names, lambda buffer: buffer * 2).items()}
    assert found == {
        "entropy": 3.0, "entropy/own.a": 1.0, "entropy/own.c": 4.0,
        "token_share/own.a": pytest.approx(1 / 3), "token_share/own.b": 0.0, "token_share/own.c": pytest.approx(2 / 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_run_resumes_only_with_the_same_labels(name):
    identity = identity_of(compose("quickstart", ["run_dir=/nowhere", f"hierarchy={name}"]))
    assert any(key.startswith("hierarchy.token_labels.") for key in identity)
    assert identity_of_record(identity) == identity
    again = load_token_labels(hierarchy_of_record(identity))
    assert again == load_token_labels(ROOT / f"conf/hierarchy/{name}.yaml")


def test_another_marker_is_another_run():
    def of(marker: str):
        markers = OmegaConf.create(
            {"hierarchy": {"token_labels": {"segment": {"markers": {"think": [marker, "</t>"]}}}}}
        )
        return identity_of(
            OmegaConf.merge(compose("quickstart", ["run_dir=/nowhere", "hierarchy=think_answer"]), markers)
        )

    one, other = of("<t>"), of("<u>")
    assert {key for key in one if one[key] != other[key]} == {"hierarchy.token_labels.segment.markers.think"}


SECTION = re.search(r"\n## Strata within a response\n(.*?)\n## ", (ROOT / "docs/hierarchy.md").read_text(), re.S)
assert SECTION is not None


def test_the_hierarchy_of_the_documentation_is_read_and_checked(tmp_path):
    [text] = re.findall(r"```yaml\n# conf/hierarchy/my_segments\.yaml\n(.*?)```", SECTION[1], re.S)
    (tmp_path / "my_segments.yaml").write_text(text)
    strata_of(tmp_path / "my_segments.yaml").check()
    assert strata_of(tmp_path / "my_segments.yaml").names["segment"] == ("think", "answer")
    ready = re.findall(r"^\| `(\w+)` \| domain, group", SECTION[1], re.M)
    assert set(ready) == set(FILES)


def test_the_override_of_the_documentation_changes_the_markers():
    [given] = re.findall(r"'(hierarchy\.token_labels\.segment\.markers=.*)'", SECTION[1])
    cfg = compose("quickstart", ["run_dir=/nowhere", "hierarchy=think_answer", given])
    labels = hierarchy_section(cfg)[2]
    assert labels is not None
    assert labels.written()["token_labels"]["segment"]["markers"] == {"think": ("<reason>", "</reason>")}


def test_the_function_of_the_documentation_is_one():
    [text] = re.findall(r"```python\n(.*?)```", SECTION[1], re.S)
    of: dict = {}
    exec(text, of)
    assert of["labels"]([7, 8, 9], "abc", None) == ([0, 1, 1], ["first_half", "second_half"])


def test_every_source_of_the_documentation_is_read():
    rows = re.findall(r"^\| `((?:markers|bins|split|regex):.*?)` \| (.*?) \|", SECTION[1], re.M)
    assert len(rows) == 5
    for source, keys in rows:
        names = "names: [search, python]" if "names:" in keys else ""
        cfg = OmegaConf.create("{" + ", ".join(filter(None, [source.replace("\\|", "|"), names])) + "}")
        labels = load_token_labels(hierarchy(OmegaConf.to_container(cfg)))
        assert labels is not None and len(labels.cells["own"] or ()) > 1
