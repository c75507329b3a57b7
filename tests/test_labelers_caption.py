"""Captions: every family from a folder, exact words from networks that know two pictures, draws that belong to the
sample, styles, and the list of all texts with their sources."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_words import (
    CAPTIONERS,
    LESSONS,
    QUESTION,
    SAVERS,
    WORDS,
    bert_tokenizer,
    opt_tokenizer,
    save_blip,
    save_siglip,
    teach,
)

from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch, Failure
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops

CROP = 48
EMPTY = Failure("empty caption: the network generated no words")


def captioner(folder: Path | str, **options: Any) -> Any:
    component = LABELERS.build("caption", {"checkpoint": str(folder), "max_new_tokens": 6, **options})
    component.load("cpu")
    return component


def noise(count: int = 3) -> Batch:
    """Pictures of different sizes, brought to one size by their crops."""
    rng = np.random.default_rng(0)
    crops = []
    for row in range(count):
        height, width = rng.integers(30, 120, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        crop = draw_crops(f"k{row}", height, width, CropConfig(size=CROP))[0]
        crops.append(apply_crop(image, crop, CROP).transpose(2, 0, 1))
    return Batch([f"k{row}" for row in range(count)], np.stack(crops))


def flat(*values: int, alt_text: list[str | None] | None = None) -> Batch:
    """Pictures of one brightness each."""
    pixels = np.stack([np.full((3, CROP, CROP), value, dtype=np.uint8) for value in values])
    return Batch([f"k{i}" for i in range(len(values))], pixels, {"alt_text": alt_text} if alt_text else {})


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of networks that say "red cone" of a black picture and "the blue box" of a white one, by family."""
    return functools.cache(lambda family: teach(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(params=["blip", "git", "florence2", "llava"])
def knower(request: pytest.FixtureRequest, taught: Callable[[str], Path]) -> dict[str, Any]:
    """A decoder that looks across, one of pictures and words, an encoder-decoder, and a chat model."""
    return {"folder": taught(request.param), **({"prompt": QUESTION} if request.param == "llava" else {})}


# Exact words


def test_network_that_knows_two_pictures_says_what_they_are(knower: dict[str, Any]) -> None:
    made = captioner(**knower)
    assert made.run(flat(0, 255, 0))["caption"] == ["red cone", "the blue box", "red cone"]


def test_beams_and_half_precision_say_the_same(knower: dict[str, Any]) -> None:
    for options in ({"num_beams": 3}, {"precision": "bfloat16"}):
        made = captioner(**knower, **options)
        assert made.run(flat(255, 0))["caption"] == ["the blue box", "red cone"]


def test_caption_does_not_depend_on_its_neighbours(knower: dict[str, Any]) -> None:
    """Rows end at different lengths: the shorter ones wait for the longest, and their captions must not change."""
    made = captioner(**knower)
    for values in ((0,), (255,), (0, 0, 0, 255), (255, 0, 255)):
        assert made.run(flat(*values))["caption"] == [LESSONS[value] for value in values]


@pytest.mark.parametrize("family", ["blip", "git"])
def test_prompt_is_continued_and_is_not_part_of_the_caption(taught: Callable[[str], Path], family: str) -> None:
    made = captioner(taught(family), prompt="the blue")
    assert made.run(flat(255, 255))["caption"] == ["box", "box"]
    beams = captioner(taught(family), prompt="the blue", num_beams=3, count=2, outputs=["captions"])
    texts = [[entry["text"] for entry in row] for row in beams.run(flat(255, 255))["captions"]]
    assert all(row[0] == "box" and len(row) == 2 and "the blue" not in row for row in texts)


# Every family


@pytest.mark.parametrize("family", CAPTIONERS)
def test_every_family_captions_pictures_of_mixed_sizes_from_a_folder(tmp_path: Path, family: str) -> None:
    folder = SAVERS[family](tmp_path / family)
    made = captioner(folder, num_beams=2, count=2, outputs=["caption", "captions"])
    found = made.run(noise())
    assert list(found) == ["caption", "captions"]
    for caption, entries in zip(found["caption"], found["captions"], strict=True):
        if caption == EMPTY:  # random weights may end at once
            assert all(entry["text"] for entry in entries) if entries != EMPTY else True
            continue
        words = caption.split()
        assert 1 <= len(words) <= 6
        assert entries[0] == {"text": caption, "source": made.source, "style": "short"}
        assert set(words) <= {*WORDS.split(), "[UNK]"} or family == "paligemma"  # which knows 1,152 places too


@pytest.mark.parametrize("family", CAPTIONERS)
def test_draws_of_every_family_belong_to_the_sample_not_to_the_batch(tmp_path: Path, family: str) -> None:
    made = captioner(
        SAVERS[family](tmp_path / family), do_sample=True, temperature=2.0, top_p=0.95, outputs=["caption"]
    )
    batch = noise(4)
    together = made.run(batch)["caption"]
    assert made.run(batch)["caption"] == together
    assert made.run(batch.select([3, 1]))["caption"] == [together[3], together[1]]
    assert [made.run(batch.select([i]))["caption"][0] for i in range(4)] == together
    assert len({str(caption) for caption in together}) > 1
    torch.manual_seed(5)  # the global generator has no say
    assert made.run(batch)["caption"] == together


@pytest.mark.parametrize("family", CAPTIONERS)
def test_every_family_runs_in_half_precision(tmp_path: Path, family: str) -> None:
    made = captioner(SAVERS[family](tmp_path / family), precision="bfloat16", do_sample=True, temperature=2.0)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert any(isinstance(caption, str) for caption in made.run(noise())["caption"])


def test_draws_differ_by_seed_key_style_and_number(tmp_path: Path) -> None:
    folder = save_blip(tmp_path / "blip")
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "outputs": ["captions"]}
    one = noise(1)
    twins = Batch(["k0", "k1"], np.concatenate([one.pixels, one.pixels]))  # type: ignore[list-item]
    first = captioner(folder, **options, styles={"short": {}, "other": {"count": 3}})
    row, other_key = first.run(twins)["captions"]
    assert len({entry["text"] for entry in row}) == 4  # one short, three others
    assert [entry["style"] for entry in row] == ["short", "other", "other", "other"]
    assert row[0]["text"] != other_key[0]["text"]
    seeded = captioner(folder, **options, seed=1).run(one)["captions"][0]
    assert seeded[0]["text"] != row[0]["text"]


def test_network_that_ends_at_once_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    made = captioner(save_blip(tmp_path / "blip"), outputs=["caption", "captions"])
    made.model.text_decoder.get_output_embeddings().bias[3] = 100.0  # [SEP], the end
    found = made.run(noise(2))
    assert found["caption"] == [EMPTY, EMPTY]
    assert found["captions"] == [EMPTY, EMPTY]
    with_alt_text = made.run(flat(0, alt_text=["a cone"]))
    assert with_alt_text["caption"] == [EMPTY]
    assert with_alt_text["captions"] == [[{"text": "a cone", "source": "alt_text", "style": "alt_text"}]]


# Styles, and all texts


def test_captions_are_the_alt_text_and_every_style_once_each_with_its_source(taught: Callable[[str], Path]) -> None:
    styles = {"short": {}, "again": {"num_beams": 2}, "end": {"prompt": "the blue"}}
    made = captioner(taught("blip"), outputs=["caption", "captions"], styles=styles)
    assert made.makes == ("caption", "captions")
    assert made.also_reads == ("alt_text",)
    found = made.run(flat(255, 255, 0, alt_text=["IMG_12.jpg", None, " red cone "]))
    assert found["caption"] == ["the blue box", "the blue box", "red cone"]
    ours = [
        {"text": "the blue box", "source": made.source, "style": "short"},
        {"text": "box", "source": made.source, "style": "end"},
    ]
    assert found["captions"][0] == [{"text": "IMG_12.jpg", "source": "alt_text", "style": "alt_text"}, *ours]
    assert found["captions"][1] == ours
    assert found["captions"][2][0] == {"text": "red cone", "source": "alt_text", "style": "alt_text"}
    assert [entry["text"] for entry in found["captions"][2]].count("red cone") == 1


def test_first_style_makes_the_caption_and_alt_text_is_not_read_for_it(taught: Callable[[str], Path]) -> None:
    made = captioner(taught("blip"), styles={"end": {"prompt": "the blue"}, "short": {}})
    assert made.also_reads == ()
    assert made.run(flat(255))["caption"] == ["box"]


def test_source_names_the_weights_not_where_they_lay(tmp_path: Path) -> None:
    folder = save_blip(tmp_path / "one")
    before = captioner(folder).source
    folder.rename(tmp_path / "two")
    assert captioner(tmp_path / "two").source == before
    assert before.startswith("blip@")
    assert str(tmp_path) not in before


# Prompts


def test_florence_task_that_makes_boxes_is_refused_and_names_those_that_make_text(tmp_path: Path) -> None:
    folder = SAVERS["florence2"](tmp_path / "florence")
    with pytest.raises(
        ValueError, match=r"'<OD>' makes description_with_bboxes, not a caption; .*<MORE_DETAILED_CAPTION>"
    ):
        captioner(folder, prompt="<OD>")


@pytest.mark.parametrize(
    ("family", "prompt", "text"),
    [
        ("blip", None, None),
        ("git", "a red", "a red"),
        ("florence2", None, "does the image describe ?"),
        ("paligemma", None, "caption en"),
        ("llava", "what is this ?", "user : what is this ? assistant :"),
        ("idefics3", "what is this ?", "user : what is this ? assistant :"),
    ],
)
def test_each_family_is_asked_in_its_own_way(tmp_path: Path, family: str, prompt: str | None, text: str | None) -> None:
    made = captioner(SAVERS[family](tmp_path / family), prompt=prompt)
    inputs = made.prompter.inputs(torch.from_numpy(noise().pixels), made.prompts["short"])
    if text is None:
        assert "input_ids" not in inputs
        return
    asked = made.prompter.processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert [" ".join(row.replace("[UNK]", "").split()) for row in asked] == [text] * 3
    assert bool((inputs["attention_mask"] == 1).all())  # nothing is padded


def test_chat_prompt_holds_one_picture_and_the_place_of_the_answer(tmp_path: Path) -> None:
    made = captioner(SAVERS["llava"](tmp_path / "llava"), prompt="what is this ?")
    inputs = made.prompter.inputs(torch.from_numpy(noise().pixels), "what is this ?")
    assert (inputs["input_ids"] == made.model.config.image_token_id).sum(dim=1).tolist() == [
        16,
        16,
        16,
    ]  # 4 x 4 patches


def test_compile_without_an_image_encoder_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = captioner(save_blip(tmp_path / "blip"))
    made.config = made.config.model_copy(update={"compile": True})
    made.model = torch.nn.Linear(1, 1)
    with caplog.at_level(logging.WARNING):
        made._adopt_parts()
    assert "compile has no effect: no image encoder was found" in caplog.text


# Checkpoints


def test_checkpoint_of_another_family_is_refused_saying_who_takes_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="holds SiglipModel, which the labeler 'caption' does not take; the labeler 'clip'"
    ):
        captioner(save_siglip(tmp_path / "siglip"))


def test_checkpoint_without_its_tokenizers_files_is_refused(tmp_path: Path) -> None:
    """transformers would make an empty tokenizer, and every caption would be empty."""
    folder = save_blip(tmp_path / "blip")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="knows 5 tokens of the 42 that the network can say: the tokenizer's"):
        captioner(folder)


def test_demo_captions_name_the_colours_and_shapes_of_unseen_scenes() -> None:
    """F1 of 'colour shape' phrases: 0.66."""
    from fourmill.demo.teacher_figures import caption_figures
    from fourmill.scenes import render

    scenes = [render(99, i, 128) for i in range(48)]
    pixels = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
    captions = captioner("demo:caption", max_new_tokens=40).run(Batch([str(i) for i in range(48)], pixels))["caption"]
    figures = caption_figures(captions, [scene.summary for scene in scenes])
    assert figures["phrase_f1"] > 0.55


# Through the pipeline


def test_captions_are_the_same_bytes_whatever_the_batch_size(tmp_path: Path) -> None:
    """Drawn captions and CLIP features of pictures of different sizes, from a tar to committed shards."""
    import toys

    from fourmill.config import Config
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.runner import run
    from fourmill.pipeline.shards import read_shard
    from fourmill.pipeline.store import open_store

    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "outputs": ["caption", "captions"]}
    labelers: dict[str, Any] = {
        "caption": {"checkpoint": str(SAVERS["git"](tmp_path / "git")), **drawn},
        "clip": {"checkpoint": str(SAVERS["open_clip"](tmp_path / "clip"))},
    }
    sizes = [(40, 32), (33, 90), (64, 64), (20, 50), (100, 30)]
    pictures = {i: toys.jpeg(toys.picture(i, *size)) for i, size in enumerate(sizes)}
    digests, texts = [], {}
    for batch_size in (1, 2, 5):
        dataset = toys.make_dataset(tmp_path, str(tmp_path / f"dataset{batch_size}"), 5, 3, damaged=pictures)
        sized = {name: {**options, "batch_size": batch_size} for name, options in labelers.items()}
        settings: dict[str, Any] = {"crops": {"size": CROP}, "labelers": sized, "ray": {"address": "none"}}
        settings["stages"] = {"words": {"labelers": ["caption", "clip"]}}
        report = run(Config(dataset=dataset, **settings))
        assert report.ok
        store = open_store(dataset)
        manifest = read_manifest(store)
        digests.append([r.digest for name in ("caption", "captions") for r in manifest.records(name)])
        shards = [read_shard(store, r.name) for r in manifest.records("captions")]
        texts = {k: v for shard in shards for k, v in zip(shard.keys, shard.values(), strict=True)}
        assert [r.present for r in manifest.records("clip")] == [3, 2]
    assert digests[0] == digests[1] == digests[2]
    assert [entry["source"] for entry in texts["000000003"]] == ["alt_text", texts["000000003"][1]["source"]]
    assert texts["000000003"][0]["text"] == "number 3"
    assert len({entries[1]["text"] for entries in texts.values()}) == 5


# Published sizes, random weights


@pytest.mark.slow
def test_blip_base_at_full_size(tmp_path: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    vision = {"image_size": 384, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
    text = {"vocab_size": 30_524, "encoder_hidden_size": 768, "bos_token_id": 2, "sep_token_id": 3}
    config = BlipConfig(vision_config=vision, text_config=text)
    full_size(
        tmp_path, BlipForConditionalGeneration(config), BlipProcessor(BlipImageProcessor(), bert_tokenizer(30_524))
    )


@pytest.mark.slow
def test_git_base_at_full_size(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(0)
    config = GitConfig(
        vision_config={"image_size": 224, "patch_size": 16}, vocab_size=30_522, bos_token_id=2, eos_token_id=3
    )
    full_size(tmp_path, GitForCausalLM(config), GitProcessor(CLIPImageProcessor(), bert_tokenizer(30_522)))


@pytest.mark.slow
def test_florence_2_base_at_full_size(tmp_path: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    torch.manual_seed(0)
    words = opt_tokenizer("<image>", size=51_290, extra_special_tokens={"image_token": "<image>"})
    text = {
        "model_type": "bart", "vocab_size": 51_290, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {"embed_dim": [128, 256, 512, 1024], "depths": [1, 1, 9, 1], "projection_dim": 768}
    config = Florence2Config(
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>")
    )
    images = CLIPImageProcessor(size={"height": 768, "width": 768}, do_center_crop=False, image_seq_length=577)
    processor = Florence2Processor(images, words, post_processor_config={"pure_text": {}})
    full_size(tmp_path, Florence2ForConditionalGeneration(config), processor)


def full_size(folder: Path, model: Any, processor: Any) -> None:
    """One picture through a network of published size, from a folder; drawn, so that it does not end at once."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    made = captioner(folder, do_sample=True, max_new_tokens=5, outputs=["caption"])
    (caption,) = made.run(noise(1))["caption"]
    assert 1 <= len(caption.split()) <= 5
