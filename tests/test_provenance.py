"""What a run is compared with on resume: its recorded configuration and digests, and defaults for what older code did not record."""

import dataclasses
import json

import ml_collections
import pytest
from etils import epath

from f2llm_jax.configs import ml_embed, stage2
from f2llm_jax.storage import files
from f2llm_jax.training.provenance import Provenance, ResumeError, check_changes

WORKDIR = epath.Path("run")
DIGESTS = {"data": "d", "tokenizer": "t", "teacher": "", "code": "c", "own": ""}


def provenance(config, **digests):
    return Provenance(config=files.plain(config.to_dict()), **{**DIGESTS, **digests})


def recorded(config, *forgotten, **digests):
    """As a checkpoint of code that did not have the forgotten fields or groups gives it back."""
    content = json.loads(json.dumps(dataclasses.asdict(provenance(config, **digests))))
    for name in forgotten:
        *groups, last = name.split(".")
        group = content["config"]
        for key in groups:
            group = group[key]
        del group[last]
    return content


def fields(config):
    """Names of all but the size, dotted."""
    groups = {name: list(fields(value)) if isinstance(value, ml_collections.ConfigDict) else [""] for name, value in config.items()}
    return [f"{name}.{field}".rstrip(".") for name, inner in groups.items() for field in inner if name != "size"]


def changes(now, before):
    return provenance(now).changes(before, WORKDIR)


@pytest.mark.parametrize("argument", ["size=0.6b", "size=14b", "size=80m"])
def test_every_field_at_its_default_may_be_unrecorded(argument):
    """Those too whose default goes by the size."""
    config = stage2.get_config(argument)
    names = fields(config)
    assert {"objective.hard_weight", "batch.negatives.clustering", "mesh.fsdp", "seed"} <= set(names)
    for name in names:
        assert changes(config, recorded(config, name)) == {}, name
    assert changes(config, recorded(config, *(name for name in config.to_dict() if name != "size"))) == {}


@pytest.mark.parametrize(
    ("field", "value", "before", "now"),
    [
        ("objective.hard_weight", 0.5, 1.0, 0.5),
        ("objective.matryoshka_dims", (64, 128), [], [64, 128]),
        ("objective.false_negative_margin", 0.2, "inf", 0.2),
        ("batch.negatives.retrieval", 3, 7, 3),
        ("batch.microbatch_rows", 64, 1280, 64),
        ("batch.chunk_rows", 8, 64, 8),
        ("table_rank_sampled", False, True, False),
    ],
)
def test_an_unrecorded_field_counts_as_its_default(field, value, before, now):
    config = stage2.get_config("size=8b")
    old = recorded(config, field)
    config.update_from_flattened_dict({field: value})
    assert changes(config, old) == {field: (before, now)}


def test_an_unrecorded_group_counts_as_its_defaults():
    config = stage2.get_config("size=8b")
    old = recorded(config, "objective", "batch.negatives")
    config.update_from_flattened_dict({"objective.focal": 0.5, "batch.negatives.clustering": 2})
    assert changes(config, old) == {"objective.focal": (0.0, 0.5), "batch.negatives.clustering": (9, 2)}


def test_a_recorded_field_counts_as_it_was_recorded():
    """And not as its default, which it has now."""
    config = stage2.get_config()
    config.objective.hard_weight = 0.5
    assert changes(stage2.get_config(), recorded(config)) == {"objective.hard_weight": (0.5, 1.0)}


def test_the_default_is_that_of_common_and_not_of_the_configuration_file():
    config = ml_embed.get_config()
    assert changes(config, recorded(config, "table_rank_sampled")) == {"table_rank_sampled": (True, False)}


@pytest.mark.parametrize("size", ["toy", ""])
def test_a_size_without_a_row_has_the_defaults_of_0_6b(size):
    config = stage2.get_config("size=8b")
    config.size = size
    assert changes(config, recorded(config, "batch.chunk_rows")) == {"batch.chunk_rows": (32, 64)}


def test_a_field_of_the_users_own_was_none():
    config = stage2.get_config()
    old = recorded(config)
    config.margin, config.extra = 0.1, {"depth": 2, "unset": None}
    assert changes(config, old) == {"margin": (None, 0.1), "extra.depth": (None, 2)}


def test_a_field_that_is_gone_is_none():
    config = stage2.get_config()
    old = recorded(config)
    old["config"]["objective"]["removed"] = 3
    del config.objective.focal
    assert changes(config, old) == {"objective.removed": (3, None), "objective.focal": (0.0, None)}


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_digest_that_is_not_recorded_is_not_compared(digest):
    config = stage2.get_config()
    old = recorded(config)
    del old[digest]
    assert provenance(config, **{digest: "another"}).changes(old, WORKDIR) == {}
    old["of newer code"] = "something"
    assert changes(config, old) == {}


def test_a_digest_that_is_recorded_is_compared():
    config = stage2.get_config()
    found = provenance(config, data="e", own="loss").changes(recorded(config), WORKDIR)
    assert found == {"content of the data": ("d", "e"), "own objective": ("", "loss")}


def test_what_may_change_may_be_unrecorded():
    config = stage2.get_config("size=8b")
    old = recorded(config, "checkpoint", "hang_minutes", "batch.chunk_rows", "objective.hard_weight")
    config.update_from_flattened_dict({"checkpoint.keep": 9, "hang_minutes": 0.0, "batch.chunk_rows": 0})
    found = changes(config, old)
    assert found == {"checkpoint.keep": (3, 9), "hang_minutes": (10.0, 0.0), "batch.chunk_rows": (64, 0)}
    check_changes(found, WORKDIR, allowed=False)
    config.objective.hard_weight = 0.5
    with pytest.raises(ResumeError, match=r"run is another run:\n  objective\.hard_weight: 1\.0 before, 0\.5 now\nuse another"):
        check_changes(changes(config, old), WORKDIR, allowed=False)
    check_changes(changes(config, old), WORKDIR, allowed=True)


def test_weights_that_were_not_trained_here():
    with pytest.raises(ResumeError, match="was not trained here"):
        provenance(stage2.get_config()).changes(None, WORKDIR)
