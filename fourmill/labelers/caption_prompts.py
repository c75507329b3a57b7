"""How each family of captioning networks is asked, and how its answer becomes text.

All rows of a batch have the same prompt and pictures of the same size, so nothing is ever padded and a caption cannot
depend on its neighbours.

Shapes: B pictures, S side of the crop, N tokens of the prompt, T tokens of the answer.
"""

from __future__ import annotations

from typing import Any

import torch

from fourmill.checkpoints import Checkpoint

_CHAT_PROMPT = "Describe this picture in one short sentence."
_PROMPTS = {"florence2": "<CAPTION>", "paligemma": "caption en"}
# Their processors put the picture's place into the text; others with an image token want it there already.
_PLACES_PICTURES = ("blip-2", "instructblip", "florence2")


class Prompter:
    """A checkpoint's processor, asked in the way that its family wants."""

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(checkpoint.location, revision=checkpoint.revision)
        self.family, self.has_encoder = config.model_type, bool(config.is_encoder_decoder)
        self.is_chat = bool(getattr(self.processor, "chat_template", None))
        if not (hasattr(self.processor, "tokenizer") and hasattr(self.processor, "image_processor")):
            raise ValueError(
                f"{checkpoint.reference}: its processor is a {type(self.processor).__name__}; a captioner needs one "
                "for pictures and text: a processor_config.json, or a preprocessor_config.json and a tokenizer"
            )
        # Without a vocabulary file transformers makes an empty tokenizer, and says nothing.
        known, sayable = len(self.processor.tokenizer), config.get_text_config().vocab_size
        if known < sayable / 2:
            raise ValueError(
                f"{checkpoint.reference}: its tokenizer knows {known} tokens of the {sayable} that the network can "
                "say: the tokenizer's files are missing"
            )

    def prompt(self, given: str | None) -> str | None:
        """What to ask: as configured, or what the family wants at least. ValueError for what does not make text."""
        prompt = given or (_CHAT_PROMPT if self.is_chat else _PROMPTS.get(self.family))
        if self.family == "florence2":
            kinds = self.processor.tasks_answer_post_processing_type
            if kinds.get(prompt, "pure_text") != "pure_text":
                text = ", ".join(task for task, kind in kinds.items() if kind == "pure_text")
                raise ValueError(f"the prompt {prompt!r} makes {kinds[prompt]}, not a caption; those that do: {text}")
        return prompt

    def inputs(self, pixels_BCSS: torch.Tensor, prompt: str | None) -> Any:
        """The network's inputs for uint8 pictures, on their device."""
        images: list[Any] = list(pixels_BCSS)
        text = {} if prompt is None else {"text": [self._worded(prompt)] * len(images)}
        if self.is_chat:
            images = [[image] for image in images]
        inputs = self.processor(images=images, return_tensors="pt", **text).to(pixels_BCSS.device)
        inputs.pop("labels", None)  # PaliGemma's, for training
        if self.family == "git" and prompt is not None and self._is_closed(inputs["input_ids"]):
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        return inputs

    def texts(self, inputs: Any, ids_BT: torch.Tensor, prompt: str | None, side: int) -> list[str]:
        """The answers, without the prompt and without marks."""
        ids_BT = ids_BT.cpu()
        ids_BT = ids_BT[:, self._echo(inputs, ids_BT) :]
        if self.family != "florence2":
            return [t.strip() for t in self.processor.batch_decode(ids_BT, skip_special_tokens=True)]
        pad = self.processor.tokenizer.pad_token_id
        raw = (self.processor.tokenizer.decode(row[row != pad]) for row in ids_BT)
        answers = (self.processor.post_process_generation(text=t, task=prompt, image_size=(side, side)) for t in raw)
        return [answer[prompt].strip() for answer in answers]

    def _worded(self, prompt: str) -> str:
        """The prompt with the place of the picture in it."""
        if self.is_chat:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        place = getattr(self.processor, "image_token", None)
        if place is None or self.family in _PLACES_PICTURES or str(place) in prompt:
            return prompt
        return f"{place}{prompt}"

    def _is_closed(self, ids_BN: torch.Tensor) -> bool:
        """Whether the tokenizer put a closing mark after the prompt; GIT would have nothing to continue."""
        return int(ids_BN[0, -1]) == self.processor.tokenizer.sep_token_id

    def _echo(self, inputs: Any, ids_BT: torch.Tensor) -> int:
        """How many of the first tokens repeat the prompt. BLIP drops its last one, the closing mark, and puts its own
        opening mark in place of the first."""
        if self.has_encoder or "input_ids" not in inputs:
            return 0
        given_BN = inputs["input_ids"].cpu()
        given_BN = given_BN.repeat_interleave(len(ids_BT) // len(given_BN), dim=0)  # several beams a picture
        for count in (given_BN.shape[1], given_BN.shape[1] - 1):
            if count <= ids_BT.shape[1] and torch.equal(ids_BT[:, 1:count], given_BN[:, 1:count]):
                return count
        return 0
