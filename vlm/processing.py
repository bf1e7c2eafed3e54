"""How does a conversation with images become the model's inputs? One path for every use.

Shapes: L sequence, T views, S view size, n images, B batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from connectors.views import TextSource
from vlm.batches import IGNORE, joined, packed, padded
from vlm.chat_templates import CHAT_TEMPLATES, load
from vlm.conversations import (
    Message,
    check_length,
    check_messages,
    in_order,
    kinds_shown,
    videos_as_images,
)
from vlm.errors import UserError
from vlm.image_processing import VlmImageProcessor, grids_and_sizes
from vlm.instructions import FOLDER, IDS, MASK, instructions, join, load_tokenizer, tokenize
from vlm.prompt_tokens import prompt_tokens
from vlm.tiling import Size
from vlm.video import SampledVideo
from vlm.video_times import Shown, ShownVideo, shown_video, with_times

IMAGE_TOKEN = "<image>"


class VlmProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template in one; saved and loaded with the model."""

    def __init__(
        self,
        image_processor: VlmImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        reads_instructions: bool = False,
        **kwargs: Any,
    ) -> None:
        """Join the parts; the tokenizer must know the image token already (see `prepare`).

        With `reads_instructions`, `instruction_tokenizer` has to be set before the first use.
        """
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.reads_instructions = reads_instructions
        self.instruction_tokenizer: PreTrainedTokenizerBase | None = None
        self.image_token = image_token
        image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if not isinstance(image_token_id, int) or image_token_id == tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no image token {image_token!r}")
        self.image_token_id: int = image_token_id

    @classmethod
    def prepare(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: VlmImageProcessor,
        chat_template: str | None = None,
        text_source: TextSource | None = None,
    ) -> "VlmProcessor":
        """Add the tokens that images and the template need to the tokenizer, and join the parts.

        Args:
            tokenizer: a fast tokenizer; it is changed.
            image_processor: what cuts and normalises images.
            chat_template: name of one of `CHAT_TEMPLATES`; None keeps the tokenizer's own.
            text_source: how instructions are tokenised that the connector reads; None: it does not.

        Raises:
            UserError: unknown template, no template at all, or a tokenizer without an eos token.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell where in the "
                "text its tokens stand; use a fast one"
            )
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no eos token, so a reply could never end")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if chat_template is None and tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; set chat_template in the recipe's model to "
                f"one of {', '.join(sorted(CHAT_TEMPLATES))}"
            )
        text = tokenizer.get_chat_template() if chat_template is None else load(chat_template)
        wanted = (IMAGE_TOKEN,)
        if chat_template is not None:
            wanted += CHAT_TEMPLATES[chat_template].special_tokens
        known = tokenizer.get_vocab()
        missing = [token for token in wanted if token not in known]
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
        processor = cls(
            image_processor,
            tokenizer,
            chat_template=text,
            reads_instructions=text_source is not None,
        )
        if text_source is not None:
            processor.instruction_tokenizer = load_tokenizer(text_source)
        return processor

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does, and the instructions' tokenizer in a folder of its own."""
        if self.instruction_tokenizer is not None:  # first, to be there where all is pushed
            self.instruction_tokenizer.save_pretrained(Path(save_directory) / FOLDER)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and the instructions' tokenizer where they are read."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if processor.reads_instructions:
            processor.instruction_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=FOLDER, **kwargs
            )
        return processor

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image] = (),
        *,
        videos: Sequence[SampledVideo] = (),
        shown: Sequence[Shown] | None = None,
        supervise: bool = False,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Turn one conversation into unbatched tensors.

        Args:
            messages: see `vlm.conversations`.
            images: decoded images, in the order of the messages' image entries.
            videos: decoded videos, in the order of the messages' video entries.
            shown: instead of images and videos whose features are known already; no pixel_values
                come out.
            supervise: add labels: assistant content and end-of-turn, IGNORE elsewhere.
            add_generation_prompt: end with the opening of an assistant turn.
            max_length: most tokens allowed; nothing is ever truncated.

        Returns:
            input_ids (L,), attention_mask (L,), labels (L,) if supervised, and, if there are
            images or videos, pixel_values (T, 3, S, S), tile_grids (n, 2; a video's row is 0 and
            its number of frames) and image_sizes (n, 2); where the connector reads instructions,
            qformer_input_ids and qformer_attention_mask (n, L').

        Raises:
            UserError: the conversation cannot be encoded; the message says why, with numbers.
        """
        media: list[Any] = []
        if shown is None:
            checked = check_messages(messages, self.image_token, len(images), len(videos))
            media = in_order(checked, images, videos)
            shown = [self.shown(medium) for medium in media]
        checked, sizes, grids = self._check(messages, shown)
        counts = self._counts(sizes, grids)
        ids, labels = self._layout(
            checked, shown, counts, supervise, add_generation_prompt, max_length
        )
        encoded = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
        }
        if labels is not None:
            encoded["labels"] = torch.from_numpy(labels)
        if media:
            encoded.update(self.image_processor.encode_media(media, grids))
        elif grids:
            encoded.update(grids_and_sizes(grids, sizes))
        encoded.update(self._instructions(instructions(videos_as_images(checked))))
        return encoded

    def shown(self, medium: Image.Image | SampledVideo) -> Shown:
        """Return what counts the tokens of an image or a video."""
        if isinstance(medium, SampledVideo):
            return shown_video(medium, self.image_processor.video_config)
        return medium.size

    def num_tokens(self, messages: Sequence[Message], shown: Sequence[Shown]) -> int:
        """Return how many tokens `encode` gives for a conversation with labels, without pixels.

        Args:
            messages: see `vlm.conversations`.
            shown: for each of its images and videos.

        Raises:
            UserError: the conversation cannot be encoded.
        """
        return self.count_tokens(messages, shown)[0]

    def count_tokens(self, messages: Sequence[Message], shown: Sequence[Shown]) -> tuple[int, int]:
        """Return `num_tokens`, and how many of these are supervised."""
        checked, *placed = self._check(messages, shown)
        ids, labels = self._layout(checked, shown, self._counts(*placed), supervise=True)
        assert labels is not None, "asked for"
        return len(ids), int((labels != IGNORE).sum())

    def prompt_length(self, messages: Sequence[Message], shown: Sequence[Shown]) -> int:
        """Return how many tokens a conversation takes that waits for a reply; see `num_tokens`."""
        checked, *at = self._check(messages, shown)
        ids, _ = self._layout(checked, shown, self._counts(*at), add_generation_prompt=True)
        return len(ids)

    def _check(
        self, messages: Sequence[Message], shown: Sequence[Shown]
    ) -> tuple[list[dict[str, Any]], list[Size], list[Size]]:
        """Return checked messages, and for each placeholder (width, height) and `tile_grids`."""
        kinds = ["video" if isinstance(item, ShownVideo) else "image" for item in shown]
        num_images, num_videos = kinds.count("image"), kinds.count("video")
        checked = check_messages(messages, self.image_token, num_images, num_videos)
        assert kinds_shown(checked) == kinds, "what is shown stands in the placeholders' order"
        any_size = (1, 1)  # of a video's frames, whose tokens it does not change
        sizes = [any_size if isinstance(item, ShownVideo) else item for item in shown]
        return checked, sizes, self.image_processor.grids(shown)

    def _counts(self, sizes: Sequence[Size], grids: Sequence[Size]) -> list[int]:
        """Return the tokens that stand at each placeholder."""
        count = self.image_processor.num_tokens_of_grid
        return [count(size, grid) for size, grid in zip(sizes, grids, strict=True)]

    def _layout(
        self,
        checked: Sequence[dict[str, Any]],
        shown: Sequence[Shown],
        counts: Sequence[int],
        supervise: bool = False,
        add_generation_prompt: bool = False,
        max_length: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return ids (L,) with image tokens repeated `counts` times, and labels (L,)."""
        template = self.chat_template or ""
        assert isinstance(template, str), "one template, not several by name"
        ids, said = prompt_tokens(
            self.tokenizer,
            template,
            videos_as_images(with_times(checked, shown)),
            self.image_token,
            supervise,
            add_generation_prompt,
        )
        is_image = ids == self.image_token_id
        if is_image.sum() != len(counts):
            raise UserError(
                f"the chat template made {is_image.sum()} image tokens of {len(counts)} images; "
                "it drops or repeats placeholders"
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_image] = counts
        length = int(repeats.sum())
        check_length(checked, length, counts, max_length)
        if said is None:
            return np.repeat(ids, repeats), None
        labels = np.where(said & ~is_image, ids, IGNORE)
        return np.repeat(ids, repeats), np.repeat(labels, repeats)

    def _instructions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return images' instructions as the connector reads them; nothing if it does not."""
        if not (self.reads_instructions and texts):
            return {}
        assert self.instruction_tokenizer is not None, "see __init__"
        return tokenize(self.instruction_tokenizer, texts)

    def collate(
        self, encoded: Sequence[Mapping[str, Tensor]], padding_side: Literal["left", "right"]
    ) -> dict[str, Tensor]:
        """Pad and join what `encode` gave for several conversations; views are concatenated.

        Args:
            encoded: one dict per row.
            padding_side: "right" to train, "left" to generate.
        """
        rows = padded(encoded, self.tokenizer.pad_token_id, padding_side)
        return rows | self._join_images(encoded)

    def pack(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join what `encode` gave for several conversations as documents of one row, unpadded.

        Returns:
            What `collate` returns, (1, sum of L), with position_ids, which begin anew with each
            document, in place of the attention mask; no document's first token is learnt.
        """
        return packed(encoded) | self._join_images(encoded)

    def _join_images(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the images of several conversations, and what is asked of them, in order."""
        batch = joined(encoded, self.image_processor.model_input_names)
        asked = [row for row in encoded if IDS in row]
        if asked:
            assert self.instruction_tokenizer is not None, "see __init__"
            batch.update(join(self.instruction_tokenizer, asked))
        return batch

    def decode_reply(self, new_ids: Tensor) -> str:
        """Return generated ids (L,) as text, without special tokens and outer spaces."""
        return self.tokenizer.decode(new_ids, skip_special_tokens=True).strip()

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        instructions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise text whose image tokens stand for `images`: transformers' own interface.

        Args:
            images: as transformers has them.
            text: prompts.
            instructions: one for each image, where the connector reads them: which part of a prompt
                the user wrote cannot be told any more.
            **kwargs: to tokenizer and image processor.

        Raises:
            UserError: another number of image tokens in the text than of images, or of
                instructions.
        """
        if images is None or text is None:
            return super().__call__(images=images, text=text, **kwargs)
        flat = [images] if isinstance(images, Image.Image) else _flat(images)
        texts = [text] if isinstance(text, str) else list(text)
        counts = [item.count(self.image_token) for item in texts]
        if sum(counts) != len(flat):
            raise UserError(f"the text has {sum(counts)} image tokens, but {len(flat)} images")
        asked = list(instructions or ())
        if len(asked) != len(flat) * self.reads_instructions:
            raise UserError(
                f"the connector reads the instruction of each image: {len(flat)} images, but "
                f"{len(asked)} instructions are given"
                if self.reads_instructions
                else "the connector reads no instructions; leave them out"
            )
        images_kwargs: Any = {**kwargs.pop("images_kwargs", {}), "num_images": counts}
        made = super().__call__(images=flat, text=texts, images_kwargs=images_kwargs, **kwargs)
        made.update(self._instructions(asked) if flat else {})
        return made

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        """Return the image tokens of one image; transformers' hook for `__call__`."""
        height, width = image_inputs["image_sizes"][image_idx].tolist()
        grid = tuple(image_inputs["tile_grids"][image_idx].tolist())
        return self.image_token * self.image_processor.num_tokens_of_grid((width, height), grid)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes from this processor."""
        own = [IDS, MASK] if self.reads_instructions else []
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, *own]


def _flat(images: Sequence[Any]) -> list[Image.Image]:
    """Return images given as a list, or as a list of lists, as one list."""
    return [
        image
        for item in images
        for image in ([item] if isinstance(item, Image.Image) else list(item))
    ]
