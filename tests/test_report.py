"""The report's answers, figures and drawings, from manifests that are written down literally."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_manifests as made
from report_manifests import CROPS, DEPTH, INGEST, OLD_DEPTH, TOKENS, codes, ingested, publish, record
from token_toys import Literal

from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.manifest.verify import Options, verify
from fourmill.pipeline.report.bins import binned
from fourmill.pipeline.report.charts import Axis, Series, histogram, line_chart, short, steps, strip
from fourmill.pipeline.report.cost import Moment, costs, history, over_time
from fourmill.pipeline.report.distributions import distributions
from fourmill.pipeline.report.errors import errors
from fourmill.pipeline.report.facts import count, duration, many, percent, provenance, size, tiles
from fourmill.pipeline.report.health import Check, checks, tally, worst
from fourmill.pipeline.report.lineage import _apart, _layers, _parents, graph, tree
from fourmill.pipeline.report.makers import Maker, makers, without_secrets
from fourmill.pipeline.report.presence import presence
from fourmill.pipeline.report.samples import _spread, collect
from fourmill.pipeline.report.verified import verified
from fourmill.pipeline.store import LocalStore, open_store

EVEN = codes([5] * 8, 8)


def labels(shards: Sequence[int], **fields: Any) -> list[Any]:
    return [record("depth", s, DEPTH, **fields) for s in shards]


def tokens(shards: Sequence[int], statistics: dict[str, Any]) -> list[Any]:
    return [record("tok_depth", s, TOKENS, statistics=statistics) for s in shards]


def answer(manifest: Manifest, title: str) -> Check:
    found = checks(manifest, makers(manifest), distributions(manifest))
    return next(check for check in found if check.title == title)


# Health


def test_sound_dataset_is_good_in_all_that_was_asked(tmp_path: Path) -> None:
    own = {**made.lineages()[DEPTH], "checkpoint": {**made.NC, "licence": "mit"}}
    records = [*ingested(range(3)), *[record("depth", s, "6" * 16) for s in range(3)]]
    manifest = publish(tmp_path, records, {"sources": ["/c"]}, r6666666666666666=own)
    found = checks(manifest, makers(manifest), distributions(manifest))
    assert {c.title: c.level for c in found} == {
        "Complete": "good",
        "Rows aligned": "good",
        "One generation": "good",
        "Quarantine": "good",
        "Objects verified": "none",
        "Code use": "none",
        "Constant maps": "none",
        "Corpus": "good",
        "Attempts": "good",
        "Licences": "good",
    }
    assert worst(found) == "good"
    assert tally(found) == "7 good, 3 not known"


def test_modality_that_lacks_shards_is_named_with_how_many(tmp_path: Path) -> None:
    found = answer(publish(tmp_path, ingested(range(4)) + labels([0, 3])), "Complete")
    assert (found.level, found.items) == ("look", ("depth: lacks 2 of 4 shards",))


def test_ingested_modality_that_lacks_shards_is_bad(tmp_path: Path) -> None:
    records = [r for r in ingested(range(4)) if (r.modality, r.shard) != ("source", 2)]
    assert answer(publish(tmp_path, records), "Complete").level == "bad"


def test_other_keys_than_the_pictures_are_bad(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested(range(3)) + labels(range(3), keys_digest="other"))
    found = answer(manifest, "Rows aligned")
    assert (found.level, found.items) == ("bad", ("depth: other keys than rgb in 1 of 1 block of shards",))


def test_shards_by_two_recipes_are_bad(tmp_path: Path) -> None:
    records = [*ingested(range(3)), *labels([0, 1]), record("depth", 2, OLD_DEPTH)]
    found = answer(publish(tmp_path, records), "One generation")
    assert (found.level, found.items) == ("bad", ("depth: 2 + 1 shards by 2 recipes",))


def test_tokens_of_labels_that_were_replaced_are_bad(tmp_path: Path) -> None:
    records = ingested(range(2)) + [record("depth", s, OLD_DEPTH) for s in range(2)] + tokens(range(2), EVEN)
    found = answer(publish(tmp_path, records), "One generation")
    assert (found.level, found.items) == ("bad", ("tok_depth: made from a depth that the dataset no longer holds",))


@pytest.mark.parametrize(("rows", "level"), [(0, "good"), (1, "look"), (2, "bad")])
def test_quarantine_is_bad_above_one_row_in_a_hundred(tmp_path: Path, rows: int, level: str) -> None:
    records = ingested(range(10)) + labels(range(1, 10)) + labels([0], quarantined={"decode": rows} if rows else {})
    assert answer(publish(tmp_path, records), "Quarantine").level == level


@pytest.mark.parametrize(
    ("counts", "level"),
    [([10] * 100, "good"), ([100] * 4 + [0] * 96, "look"), ([10_000, *[0] * 999], "bad")],
)
def test_code_use_is_perplexity_over_vocabulary(tmp_path: Path, counts: list[int], level: str) -> None:
    manifest = publish(tmp_path, ingested([0]) + labels([0]) + tokens([0], codes(counts, len(counts))))
    assert answer(manifest, "Code use").level == level


def test_few_tokens_do_not_make_a_codebook_collapsed(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]) + labels([0]) + tokens([0], codes([1] * 8 + [0] * 9992, 10_000)))
    assert answer(manifest, "Code use").words == "No codebook has collapsed; the least used is tok_depth at 100%."


def test_constant_maps_are_counted_by_modality(tmp_path: Path) -> None:
    statistics = {"rows_read": 10, "constant": 2}
    manifest = publish(tmp_path, ingested([0, 1]) + labels([0, 1], statistics=statistics))
    found = answer(manifest, "Constant maps")
    assert (found.level, found.items) == ("look", ("depth: 4",))


def test_pictures_without_edges_are_told_and_nothing_to_look_at(tmp_path: Path) -> None:
    grids = codes([9] * 8, 8, constant=1)
    records = [*ingested([0]), record("canny_edge", 0, DEPTH, statistics={"rows_read": 10, "constant": 1})]
    records.append(record("tok_canny_edge", 0, TOKENS, statistics=grids))
    found = answer(publish(tmp_path, records), "Constant maps")
    assert (found.level, found.items) == ("good", ("canny_edge: 1", "tok_canny_edge: 1"))
    more = answer(publish(tmp_path, labels([0]) + tokens([0], grids)), "Constant maps")
    assert (more.level, more.items) == ("look", ("canny_edge: 1", "tok_canny_edge: 1", "tok_depth: 1"))


def test_more_attempts_than_shards_are_told(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]) + labels([0], spent={"seconds": 1.0, "attempts": 3}))
    found = answer(manifest, "Attempts")
    assert (found.level, found.items) == ("look", ("depth: 2 more attempts than shards",))


def test_licences_that_exclude_uses_or_are_unknown_are_told(tmp_path: Path) -> None:
    unknown = {"class": "X", "version": 1, "inputs": {}, "checkpoint": {"reference": "w", "licence": "unknown"}}
    records = [*ingested([0]), *labels([0]), record("normal", 0, "7" * 16)]
    found = answer(publish(tmp_path, records, r7777777777777777=unknown), "Licences")
    assert found.level == "look"
    assert found.items == (
        "depth: NON-COMMERCIAL, lab/depth-nc (cc-by-nc-4.0)",
        "normal: licence unknown, w (unknown)",
    )


def test_damage_of_the_corpus_is_told(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]), {"damaged": ["a.tar: ends"], "quarantined": {"decode": 2}})
    assert answer(manifest, "Corpus").items == ("a.tar: ends", "2 × decode")


def test_long_particulars_are_cut_and_many_are_counted(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]), {"damaged": ["x" * 500, *"abcdefgh"]})
    found = answer(manifest, "Corpus").items
    assert [len(item) for item in found] == [200, 1, 1, 1, 1, 1, 12]
    assert found[-1] == "… and 3 more"


# Verification


@pytest.mark.parametrize(
    ("outcome", "level", "words"),
    [
        ({"deep": True, "read": 9}, "good", "Snapshot 1: read 9 of 9 objects. All sound."),
        (
            {"checked": 9},
            "look",
            "Snapshot 1: asked for the existence and size of 9 of 9 objects. All there; none was read.",
        ),
        ({"ok": False, "counts": {"wrong-size": 2}, "deep": True, "read": 9}, "bad", "Not all are sound."),
        ({"snapshot": 7, "deep": True, "read": 9}, "look", "All sound, but the report is of snapshot 1."),
        ({"deep": True, "read": 9, "warned": {"constant-value": 1}}, "look", "All sound."),
    ],
)
def test_outcome_of_a_verification_is_told(tmp_path: Path, outcome: dict[str, Any], level: str, words: str) -> None:
    manifest = publish(tmp_path / "d", ingested(range(3)))
    (tmp_path / "v.json").write_text(json.dumps({"ok": True, "snapshot": 1, "deep": False, "objects": 9, **outcome}))
    found = verified(tmp_path / "v.json", manifest)
    assert found.level == level
    assert words in found.words


def test_verification_as_it_is_written_can_be_read(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "d", ingested(range(3)))
    outcome = verify(manifest.store, manifest)
    (tmp_path / "v.json").write_text(json.dumps(outcome.to_json()))
    found = verified(tmp_path / "v.json", manifest)
    assert found.level == "bad"
    assert "missing-object: 9" in found.items


def test_journal_of_a_verification_counts_what_was_sound(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "d", ingested(range(3)))
    verify(manifest.store, manifest, Options(deep=True, resume=tmp_path / "journal"))
    found = verified(tmp_path / "journal", manifest)
    assert (found.level, found.words) == (
        "look",
        "The journal of a deep verification names 0 sound objects, of any snapshot; there are 9.",
    )


def test_other_file_than_a_verification_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[]")
    with pytest.raises(ValueError, match="neither the output of `manifest verify --json` nor its journal"):
        verified(tmp_path / "x", publish(tmp_path / "d", ingested([0])))


# Bins, presence, cost


def test_every_shard_of_a_small_dataset_is_a_cell(tmp_path: Path) -> None:
    spent = {"seconds": 2.0, "gpu_seconds": 1.0, "attempts": 2}
    manifest = publish(tmp_path, ingested([0, 1, 4]) + labels([1, 4], spent=spent, quarantined={"oom": 3}))
    found = binned(manifest)["depth"]
    assert found.edges.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.sums["shards"].tolist() == [0, 1, 0, 0, 1]
    assert found.sums["present"].tolist() == [0, 7, 0, 0, 7]
    assert found.sums["seconds"].tolist() == [0, 2, 0, 0, 2]
    assert found.sums["attempts"].tolist() == [0, 2, 0, 0, 2]
    assert found.rate("rows", "seconds").tolist()[1:2] == [5.0]


def test_many_shards_share_at_most_200_cells(tmp_path: Path) -> None:
    found = binned(publish(tmp_path, [record("rgb", s) for s in range(1001)]))["rgb"]
    assert len(found) == 200
    assert found.sums["shards"].sum() == 1001
    assert set(found.sums["shards"].tolist()) == {5, 6}


def test_above_twenty_blocks_roots_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish(tmp_path, [record("rgb", 10_000 * b + 7) for b in range(25)])
    monkeypatch.setattr(LocalStore, "get", lambda *args: pytest.fail(f"{args[1]} was read"))
    found = binned(manifest)["rgb"]
    assert found.edges.tolist() == [*range(0, 250_000, 10_000), 240_008]
    assert found.sums["rows"].tolist() == [10.0] * 25


def test_presence_is_of_the_pictures_rows(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested(range(4)) + labels([0]) + labels([1], quarantined={"oom": 5}))
    (found,) = presence(manifest, binned(manifest), ["depth"])
    assert (found.share, found.null, found.shards) == (0.375, 5, 2)
    assert 'aria-label="depth: 37.5% of rows present; least in shards 2 to 2: 0.0%"' in found.strip
    assert re.findall('class="(full|part|none)" d="([^"]+)"', found.strip) == [
        ("full", "M0 1V0.000H1V1Z"),
        ("part", "M1 1V0.500H2V1Z"),
        ("none", "M2 1V0.860H4V1Z"),
    ]


def test_cost_is_summed_over_what_a_component_makes(tmp_path: Path) -> None:
    slow, fast = {"seconds": 8.0, "gpu_seconds": 4.0, "attempts": 1}, {"seconds": 2.0, "attempts": 1}
    records = ingested(range(2)) + labels(range(2), spent=slow)
    records += [record("normal", s, DEPTH, spent=fast) for s in range(2)] + [
        record("tok_depth", s, TOKENS, spent=fast) for s in range(2)
    ]
    manifest = publish(tmp_path, records)
    first, second = costs(makers(manifest), binned(manifest))
    assert (first.makes, first.seconds, first.gpu_seconds) == (("depth", "normal"), 20.0, 8.0)
    assert (first.rate, first.attempts, first.rows) == (1.0, 2, 20)
    assert (second.makes, second.rate) == (("tok_depth",), 5.0)
    assert [round(c.share, 3) for c in (first, second)] == [0.833, 0.167]


def test_time_of_mixed_generations_is_counted_once(tmp_path: Path) -> None:
    records = [record("depth", s, r, spent={"seconds": 5.0}) for s, r in ((0, DEPTH), (1, OLD_DEPTH))]
    manifest = publish(tmp_path, ingested(range(2)) + records)
    (found,) = costs(makers(manifest), binned(manifest))
    assert (found.title, found.makes, found.seconds) == ("DepthLabeler v2 + DepthLabeler v1", ("depth",), 10.0)


def test_what_is_there_holds_until_the_next_snapshot() -> None:
    moments = [Moment(n, f"2026-01-01T00:00:{10 * n:02}Z", 100 * n, 0, 0.0, 0.0, ()) for n in (1, 2)]
    ((caption, chart),) = over_time(moments)
    assert caption == "values present, all modalities together"
    assert 'd="M58.0 90.6H309.9V21.1H330"' in chart  # 100 of 216, then 200 to the right edge


def test_history_is_what_each_snapshot_held(tmp_path: Path) -> None:
    publish(tmp_path, ingested(range(2)))
    publish(tmp_path, labels(range(2), spent={"seconds": 3.0}))
    manifest = publish(tmp_path, tokens([0], EVEN))
    found = history(manifest.store, manifest)
    assert [m.present for m in found] == [60, 80, 90]
    assert [m.seconds for m in found] == [0, 6, 6]
    assert [m.changed for m in found] == [
        (("crop_settings", 2), ("rgb", 2), ("source", 2)),
        (("depth", 2),),
        (("tok_depth", 1),),
    ]
    assert len(history(manifest.store, read_manifest(manifest.store, 2))) == 2


def test_history_goes_on_where_a_root_is_gone_or_cannot_be_read(tmp_path: Path) -> None:
    for number in range(4):
        manifest = publish(tmp_path, [record("rgb", number)])
    (tmp_path / "manifest" / "snapshot-000002.json").unlink()
    (tmp_path / "manifest" / "snapshot-000003.json").write_text('{"format": 99}')
    found = history(manifest.store, manifest)
    assert [(m.snapshot, m.changed) for m in found] == [(1, (("rgb", 1),)), (4, (("rgb", 3),))]


def test_moments_without_time_between_them_are_not_drawn(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]))
    moments = history(manifest.store, manifest)
    assert over_time(moments) == []
    assert over_time(moments * 2) == []


# Errors, distributions


def test_errors_are_a_matrix_the_commonest_reason_first(tmp_path: Path) -> None:
    records = ingested(range(2)) + labels([0], quarantined={"oom": 1, "decode": 3}) + labels([1])
    found = errors(publish(tmp_path, records), ["rgb", "depth"])
    assert found.reasons == ("decode", "oom")
    assert [(r.name, r.counts, r.total, r.share) for r in found.rows] == [("depth", (3, 1), 4, 0.2)]


def test_rare_reasons_are_counted_together(tmp_path: Path) -> None:
    reasons = {f"reason {n} {'x' * 50}": 1 for n in range(10)}
    found = errors(publish(tmp_path, ingested([0]) + labels([0], quarantined=reasons)), ["depth"])
    assert (len(found.reasons), found.reasons[-1]) == (9, "other reasons")
    assert max(map(len, found.reasons)) == 40
    assert found.rows[0].counts == (1,) * 8 + (2,)


def test_use_of_codes_is_of_all_shards(tmp_path: Path) -> None:
    records = (
        ingested([0, 1]) + labels([0, 1]) + tokens([0], codes([2, 0, 1, 0], 4)) + tokens([1], codes([0, 0, 0, 1], 4))
    )
    (found,) = distributions(publish(tmp_path, records))["tok_depth"]
    assert dict(found.figures)["codes used"] == "3 of 4 (75.0%)"
    assert dict(found.figures)["perplexity"] == "2.8"  # 2 ** 1.5
    assert dict(found.figures)["entropy"] == "1.50 of 2.00 bits"
    assert found.code_share == pytest.approx(2**1.5 / 4)
    assert "the commonest code takes 50.00% of tokens, 3 of 4 codes occur" in found.charts[0][1]


def test_generations_are_described_apart(tmp_path: Path) -> None:
    records = [record("depth", s, r, statistics={"rows_read": s + 1}) for s, r in ((0, DEPTH), (1, OLD_DEPTH))]
    found = distributions(publish(tmp_path, ingested([0, 1]) + records))["depth"]
    assert sorted((d.recipe, dict(d.figures)["rows read"]) for d in found) == [(DEPTH, "1"), (OLD_DEPTH, "2")]


def test_statistics_are_shown_by_their_form(tmp_path: Path) -> None:
    statistics = {
        "objects": {
            "bits": 4,
            "whole": 1,
            "count": 4,
            "scaled_sum": 8 << 24,
            "min": 1,
            "max": 3,
            "bins": {"1": 2, "3": 2},
        },
        "scores": {"bits": 4, "count": 2, "scaled_sum": 1 << 24, "min": 0.5, "max": 0.5, "bins": {"0.5": 2}},
        "classes": {"bits": 3, "<b>": 1},
        "shapes": {"4x4": 7},
        "empty": 2,
    }
    records = [*ingested([0]), record("det", 0, DEPTH, statistics=statistics)]
    (found,) = distributions(publish(tmp_path, records))["det"]
    assert dict(found.figures) == {"scores": "always 0.5", "shapes": "4x4", "empty": "2"}
    assert [caption for caption, _ in found.charts] == ["objects: median 1, mean 2"]
    assert [(s.name, s.bars) for s in found.shares] == [("classes", (("bits", 3, 0.75, 1.0), ("<b>", 1, 0.25, 1 / 3)))]


def test_whole_numbers_have_bars_of_their_own(tmp_path: Path) -> None:
    spread = {"bits": 4, "whole": 1, "count": 10, "scaled_sum": 0, "min": 1, "max": 3, "bins": {"1": 1, "2": 3, "3": 6}}
    manifest = publish(tmp_path, [*ingested([0]), record("det", 0, DEPTH, statistics={"objects": spread})])
    ((_, chart),) = distributions(manifest)["det"][0].charts
    tops = [float(top) for top in re.findall(r"M[\d.]+ 160V([\d.]+)", chart)]
    assert [round((160 - top) / (160 - tops[2]), 2) for top in tops] == [0.17, 0.5, 1.0]


# Drawings


def test_ticks_are_round_numbers() -> None:
    assert steps(0, 10) == [0, 2, 4, 6, 8, 10]
    assert steps(0.13, 0.4) == [0.2, 0.3, 0.4]
    assert steps(3, 3) == [3]
    assert Axis("x", 1, 1000, log=True).ticks() == [1, 10, 100, 1000]
    assert Axis("x", 1e-9, 1, log=True).ticks() == [1e-9, 1e-07, 1e-05, 1e-03, 0.1]


def test_curves_run_from_corner_to_corner_of_their_axes() -> None:
    x, y = Axis("rank", 1, 100, log=True), Axis("share", 0, 2)
    chart = line_chart([Series("a", [1, 10, 100], [0, 1, 2])], x, y, "it grows")
    assert 'd="M58.0 160.0L194.0 85.0L330.0 10.0"' in chart
    assert 'aria-label="it grows"' in chart


def test_what_drawings_say_is_escaped() -> None:
    x, y = Axis("<x>", 0, 1), Axis("<y>", 0, 1)
    for drawing in (line_chart([], x, y, '"<w>'), histogram([0, 1], [1], x, y, '"<w>'), strip([1.0], ["full"], '"<w>')):
        assert "<x>" not in drawing
        assert "<y>" not in drawing
        assert 'aria-label="&#34;&lt;w&gt;"' in drawing


def test_long_strips_of_equal_cells_take_one_path() -> None:
    drawn = strip([1.0] * 100 + [0.5] * 100, ["full"] * 200, "w")
    assert re.findall(' d="([^"]+)"', drawn) == ["M0 1V0.000H100V1ZM100 1V0.500H200V1Z"]


def test_lineage_leaves_out_what_a_longer_way_says(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]) + labels([0]) + tokens([0], EVEN))
    parents = _parents(makers(manifest))
    assert parents == {INGEST: set(), CROPS: {INGEST}, DEPTH: {CROPS}, TOKENS: {DEPTH}}
    assert _layers(parents) == [[INGEST], [CROPS], [DEPTH], [TOKENS]]


def test_lineage_flags_weights_that_may_not_be_sold(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested([0]) + labels([0]) + tokens([0], EVEN))
    drawn = graph(makers(manifest), "<corpus>")
    assert drawn.count('class="node warn"') == 1
    assert drawn.count('class="node"') == 3
    assert "NON-COMMERCIAL cc-by…" in drawn
    assert "&lt;corpus&gt;" in drawn
    assert drawn.count('class="edge"') == 3


def test_lineage_as_a_list_hangs_each_on_the_first_that_it_was_made_from(tmp_path: Path) -> None:
    both = {"class": "Metadata", "version": 1, "inputs": {"depth": DEPTH, "normal": "a" * 16}}
    normal = {"class": "NormalLabeler", "version": 1, "inputs": {"rgb": "corpus", "crop_settings": CROPS}}
    records = [*ingested([0]), *labels([0]), record("normal", 0, "a" * 16), record("metadata", 0, "b" * 16)]
    (root,) = tree(makers(publish(tmp_path, records, raaaaaaaaaaaaaaaa=normal, rbbbbbbbbbbbbbbbb=both)))
    (crops,) = root.branches
    first, second = crops.branches
    assert (root.maker.recipe, crops.maker.recipe) == (INGEST, CROPS)
    assert {first.maker.shown, second.maker.shown} == {"depth", "normal"}
    assert [(b.maker.shown, b.also) for b in first.branches] == [("metadata", (second.maker.shown,))]
    assert second.branches == ()


def test_lineage_with_a_circle_is_drawn_all_the_same() -> None:
    layers = _layers({"a": {"b"}, "b": {"a"}, "c": {"b"}})
    assert sorted(key for layer in layers for key in layer) == ["a", "b", "c"]
    lineages = [Maker(key, (key,), "X", "1", "", (), {other: other}) for key, other in ("ab", "ba")]
    assert graph(lineages, "corpus").count("<rect") == 2
    assert len(tree(lineages)) >= 1


def test_boxes_stand_beside_their_parents_a_step_apart() -> None:
    assert _apart([0, 10, 20], 10) == [0, 10, 20]
    assert _apart([5, 5, 5], 10) == [-5, 5, 15]
    assert _apart([0, 0, 100], 10) == [-5, 5, 100]


# Words


def test_secrets_of_uris_are_left_out() -> None:
    assert without_secrets("s3://key:secret@bucket/x") == "s3://bucket/x"
    assert without_secrets("https://h/a?X-Amz-Signature=abc&v=1") == "https://h/a?X-Amz-Signature=…&v=1"
    assert without_secrets("mail a@b.org, see http://h/@x?page=2") == "mail a@b.org, see http://h/@x?page=2"


def test_provenance_is_what_ingest_recorded(tmp_path: Path) -> None:
    corpus = {"sources": ["s3://u:p@b/c"], "format": "webdataset", "samples": 1200, "ignored": {".x": 3}, "renamed": 0}
    manifest = publish(tmp_path, ingested([0]), {**corpus, "settings": {"limit": None, "check": "decode"}})
    assert provenance(manifest) == [
        ("source", "s3://b/c"),
        ("layout", "webdataset"),
        ("read with", "check decode"),
        ("samples read", "1,200"),
        ("left out", "3 × .x"),
    ]


def test_tiles_say_how_large_a_dataset_is(tmp_path: Path) -> None:
    manifest = publish(tmp_path, ingested(range(3)) + labels(range(3), spent={"seconds": 60.0, "gpu_seconds": 1800.0}))
    assert tiles(manifest) == [
        ("30", "samples"),
        ("3", "shards"),
        ("4", "modalities"),
        ("12 kB", "in objects"),
        ("3.0 min", "of worker time"),
        ("1.5 h", "of GPU time"),
    ]


def test_all_and_nothing_are_said_of_nothing_else() -> None:
    assert [percent(s) for s in (0, 1, 0.5, 0.999, 0.99999, 0.004, 0.0000001, 0.9999999)] == [
        *("0%", "100%", "50%", "99.9%", "99.999%", "0.4%", "<0.001%", ">99.999%"),
    ]


def test_numbers_are_written_for_people() -> None:
    assert [short(v) for v in (0, 1234, 0.00001, 1e7, -0.5)] == ["0", "1.23k", "1e-05", "10M", "-0.5"]
    assert [count(v) for v in (1234, 12_000_000, 1e9, 5e10)] == ["1,234", "12 M", "1,000 M", "50 G"]
    assert [size(v) for v in (999, 1500, 2.5e9, 12e12)] == ["999 bytes", "1.5 kB", "2.5 GB", "12 TB"]
    assert [duration(v) for v in (0.01, 5, 90, 7200, 864_000)] == ["10 ms", "5.0 s", "1.5 min", "2.0 h", "10.0 days"]
    assert [many(n, noun) for n, noun in ((1, "shard"), (2000, "modality"))] == ["1 shard", "2,000 modalities"]


def test_samples_are_taken_from_four_shards_by_turns(tmp_path: Path) -> None:
    data = Literal(str(tmp_path), [f"{n:02}" for n in range(40)], size=4, shards=8)
    data.pictures([np.full((4, 4, 3), n, np.uint8) for n in range(40)])
    manifest = read_manifest(open_store(data.done()))
    found, problems = collect(manifest.store, manifest, lambda key: int(key) % 5 != 0, 12)
    assert [(s.shard, s.row) for s in found] == [(shard, row) for row in (1, 2, 3) for shard in (0, 2, 4, 6)]
    assert [s.key for s in found[:4]] == ["01", "11", "21", "31"]
    assert problems == []
    few, _ = collect(manifest.store, manifest, lambda key: key == "38", 12)
    assert [(s.shard, s.row) for s in few] == [(7, 3)]


def test_samples_are_taken_from_shards_far_apart() -> None:
    assert _spread(np.arange(100, 200))[:5] == [100, 150, 125, 175, 112]
    assert _spread(np.array([7])) == [7]
    assert sorted(_spread(np.array([1, 5, 9]))) == [1, 5, 9]
    assert len(_spread(np.arange(1_000_000))) == 16
