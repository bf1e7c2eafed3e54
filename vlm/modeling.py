"""What is the model? Encoder, connector and language model, joined at the image tokens.

Shapes: B batch, L sequence, T views of all images of the batch, S view size, H W feature grid,
D encoder width, N tokens per view, E language-model width.

Surprises: with `labels`, `logits` is None (only supervised positions reach the head); a frozen
encoder runs without gradients and stays in eval mode; text-only batches send one blank view through
the vision side while it trains, so that all ranks run the same parameters.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from connectors import build_connector
from vlm.configuration import VlmConfig
from vlm.encoders import build_vision_encoder
from vlm.errors import UserError
from vlm.lm_head import document_starts, logit_transform, supervised_loss
from vlm.tiling import build_tiling
from vlm.token_layout import images_per_row, lay_out, num_image_tokens


@dataclass
class VlmOutput(CausalLMOutputWithPast):
    """What `forward` returns; `image_hidden_states` are the features (image tokens, E)."""

    image_hidden_states: Tensor | None = None


class VlmPreTrainedModel(PreTrainedModel):
    """What transformers asks of both classes below."""

    config_class = VlmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class VlmModel(VlmPreTrainedModel):
    """Vision tower, connector and bare language model: everything but the head."""

    def __init__(self, config: VlmConfig) -> None:
        """Build the architecture of `config` with random weights."""
        super().__init__(config)
        self.tiling = build_tiling(config.tiling)
        self.vision_tower = build_vision_encoder(config.vision_config)
        text_dim = config.text_config.hidden_size
        self.connector = build_connector(config.connector_config, self.vision_tower.dims, text_dim)
        self.language_model = AutoModel.from_config(config.text_config)
        if self.tiling.has_newline:
            # As LLaVA-NeXT: the scale of a unit vector's entries.
            self.image_newline = nn.Parameter(torch.randn(text_dim) / text_dim**0.5)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "VlmModel":
        """Set the mode of all parts; a frozen vision tower stays in eval mode."""
        super().train(mode)
        if mode and not _trains(self.vision_tower):
            self.vision_tower.eval()
        return self

    def view_token_grid(self) -> tuple[int, int]:
        """Return (h, w), the grid of tokens that the connector makes of one view."""
        return self.connector.token_grid(*self.vision_tower.grids[0])

    def get_view_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encode and project views (T, 3, S, S) to tokens (T, N, E)."""
        frozen = not (_trains(self.vision_tower) or pixel_values.requires_grad)
        with torch.no_grad() if frozen else nullcontext():
            features = self.vision_tower(pixel_values.to(_dtype(self.vision_tower)))
        return self.connector([feature.to(_dtype(self.connector)) for feature in features])

    def get_image_features(
        self, pixel_values: Tensor, tile_grids: Tensor, image_sizes: Tensor
    ) -> list[Tensor]:
        """Return each image's token embeddings, (num_image_tokens, E), in order.

        Args:
            pixel_values: (T, 3, S, S) views of all images, one image after the other.
            tile_grids: (n, 2) rows and columns each image was cut into.
            image_sizes: (n, 2) height and width of each image.
        """
        grids = [tuple(grid) for grid in tile_grids.tolist()]
        num_views = [self.tiling.plan_of_grid(grid).num_views for grid in grids]
        if sum(num_views) != len(pixel_values):
            raise ValueError(
                f"tile_grids {grids} mean {sum(num_views)} views, but pixel_values has "
                f"{len(pixel_values)}"
            )
        view_tokens = self.get_view_tokens(pixel_values).split(num_views)
        newline = self.image_newline if self.tiling.has_newline else None
        size, token_grid = self.vision_tower.image_size, self.view_token_grid()
        return [
            lay_out(tokens, (width, height), self.tiling, size, token_grid, newline, grid)
            for tokens, (height, width), grid in zip(
                view_tokens, image_sizes.tolist(), grids, strict=True
            )
        ]

    def count_image_tokens(self, tile_grids: Tensor, image_sizes: Tensor) -> list[int]:
        """Return how many tokens each image takes; see `get_image_features` for the arguments."""
        size, token_grid = self.vision_tower.image_size, self.view_token_grid()
        return [
            num_image_tokens((width, height), self.tiling, size, token_grid, tuple(grid))
            for grid, (height, width) in zip(tile_grids.tolist(), image_sizes.tolist(), strict=True)
        ]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        record_ids: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed the ids, put image features where the image tokens are, run the language model.

        The arguments are those of `VlmForConditionalGeneration.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, L, E)
        features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: image tokens are found by their id")
            tile_grids, image_sizes = self._with_defaults(pixel_values, tile_grids, image_sizes)
            is_image = input_ids == self.config.image_token_id  # (B, L)
            counts = self.count_image_tokens(tile_grids, image_sizes)
            images_per_row(is_image.sum(-1).tolist(), counts, record_ids)
            features = torch.cat(self.get_image_features(pixel_values, tile_grids, image_sizes))
            features = features.to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features)
        elif self.training and (_trains_vision(self) or is_deepspeed_zero3_enabled()):
            inputs_embeds = inputs_embeds + self._blank_view_term().to(inputs_embeds)

        if past_key_values is None and document_starts(position_ids, attention_mask) is not None:
            # transformers builds the block-diagonal mask of packed documents (or the sequence
            # lengths of flash attention) from position_ids, but only without a mask and a cache.
            attention_mask, kwargs["use_cache"] = None, False
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        outputs["image_hidden_states"] = features
        return outputs

    def _with_defaults(
        self, pixel_values: Tensor, tile_grids: Tensor | None, image_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return grids and sizes; both may be left out where every image is one view."""
        if tile_grids is not None and image_sizes is not None:
            return tile_grids, image_sizes
        if self.config.tiling["type"] not in ("resize", "pad"):
            raise ValueError(
                f"tiling {self.config.tiling['type']!r} needs tile_grids and image_sizes beside "
                "pixel_values"
            )
        ones = torch.ones(len(pixel_values), 2, dtype=torch.long, device=pixel_values.device)
        return ones, ones * self.vision_tower.image_size

    def _blank_view_term(self) -> Tensor:
        """Return 0 that depends on every parameter of the vision side.

        Distributed training expects gradients of the same parameters from every rank; a rank whose
        batch has no image would otherwise leave the others waiting.
        """
        size = self.vision_tower.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        term = self.get_view_tokens(blank).sum()
        if self.tiling.has_newline:
            term = term + self.image_newline.sum()
        return term * 0.0


class VlmForConditionalGeneration(VlmPreTrainedModel, GenerationMixin):
    """The whole model: `VlmModel`, the language-model head, the loss and generation."""

    accepts_loss_kwargs = True

    def __init__(self, config: VlmConfig) -> None:
        """Build the architecture of `config` with random weights."""
        super().__init__(config)
        self.model = VlmModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._declare_tied_weights()
        self._transform = logit_transform(text)
        self.post_init()

    def _declare_tied_weights(self) -> None:
        """Name the tied pair; the embedding's name differs between language models."""
        language_model = self.model.language_model
        embedding = language_model.get_input_embeddings()
        name = next(name for name, m in language_model.named_modules() if m is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}

    @classmethod
    def from_components(
        cls,
        vision_encoder: nn.Module,
        connector_config: Mapping[str, Any],
        language_model: PreTrainedModel,
        tiling: Mapping[str, Any],
        image_token_id: int,
        vocab_size: int,
    ) -> "VlmForConditionalGeneration":
        """Join loaded parts with a new connector; the parts are used, not copied.

        Args:
            vision_encoder: a `VisionEncoder`.
            connector_config: `{"type": ..., fields}`; its weights are new.
            language_model: any `AutoModelForCausalLM`; its embedding is enlarged if it is smaller
                than the vocabulary.
            tiling: `{"type": ..., fields}`.
            image_token_id: id of the image token.
            vocab_size: `len(tokenizer)`.

        Raises:
            UserError: the language model's logits are not those of its head (see `lm_head.py`).
        """
        if language_model.get_input_embeddings().num_embeddings < vocab_size:
            language_model.resize_token_embeddings(vocab_size, mean_resizing=False)
        head = language_model.get_output_embeddings()
        config = VlmConfig(
            vision_config=dict(vision_encoder.config),
            connector_config=dict(connector_config),
            text_config=language_model.config,
            tiling=dict(tiling),
            image_token_id=image_token_id,
            lm_head_bias=head.bias is not None,
            tie_word_embeddings=language_model.config.tie_word_embeddings,
            dtype=language_model.dtype,
        )
        with torch.device("meta"):
            model = cls(config)
        if type(model.model.language_model) is not type(language_model.base_model):
            raise UserError(
                f"{type(language_model).__name__} cannot be a language model here: transformers "
                f"rebuilds it as {type(model.model.language_model).__name__}, not "
                f"{type(language_model.base_model).__name__}"
            )
        text_dim = language_model.config.hidden_size
        parts = model.model
        parts.vision_tower = vision_encoder
        parts.language_model = language_model.base_model
        parts.connector = build_connector(connector_config, vision_encoder.dims, text_dim)
        parts.connector.to(language_model.device, language_model.dtype)
        if parts.tiling.has_newline:
            newline = torch.randn(text_dim, device=language_model.device) / text_dim**0.5
            parts.image_newline = nn.Parameter(newline.to(language_model.dtype))
        model.lm_head = head
        model.tie_weights()
        model.generation_config = language_model.generation_config
        model._compare_logits(language_model)
        return model

    @torch.no_grad()
    def _compare_logits(self, language_model: PreTrainedModel) -> None:
        """Check on three tokens that our head gives the language model's own logits."""
        ids = torch.arange(3, device=language_model.device)[None]
        was_training = language_model.training
        language_model.eval()
        output = language_model(ids, output_hidden_states=True, use_cache=False)
        language_model.train(was_training)
        ours = self.compute_logits(output.hidden_states[-1])
        if not torch.allclose(ours.float(), output.logits.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{type(language_model).__name__} does more to its logits than its head does, "
                "which is not known here; name the rule in vlm/lm_head.py"
            )

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    def get_image_features(
        self, pixel_values: Tensor, tile_grids: Tensor, image_sizes: Tensor
    ) -> list[Tensor]:
        """Return each image's token embeddings; see `VlmModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, tile_grids, image_sizes)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., E)."""
        logits = self.lm_head(hidden)
        return logits if self._transform is None else self._transform(logits)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        record_ids: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> VlmOutput:
        """Return logits, or, with labels, the loss.

        Args:
            input_ids: (B, L) ids, with one image token per image feature.
            attention_mask: (B, L) 0 on padding.
            position_ids: (B, L); restarts inside a row separate packed documents.
            past_key_values: cache of earlier positions.
            inputs_embeds: (B, L, E) instead of input_ids, for text without images.
            pixel_values: (T, 3, S, S) views of the batch's images, one image after the other.
            tile_grids: (n, 2) rows and columns of tiles per image.
            image_sizes: (n, 2) height and width in pixels per image.
            labels: (B, L) ids to predict, -100 elsewhere; unshifted.
            logits_to_keep: how many last positions get logits (0: all), or their indices.
            num_items_in_batch: divides the summed loss; None: the mean of this batch.
            record_ids: names of the rows, for errors.
            **kwargs: to the language model.

        Raises:
            UserError: image tokens and image features differ in number.
        """
        if labels is not None:
            kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            tile_grids=tile_grids,
            image_sizes=image_sizes,
            record_ids=record_ids,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = supervised_loss(
                hidden,
                labels.to(hidden.device),
                self.compute_logits,
                self.config.text_config.vocab_size,
                num_items_in_batch,
                document_starts(position_ids, attention_mask),
            )
        else:
            kept = slice(-logits_to_keep or None, None)
            rows = kept if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden[:, rows])
        return VlmOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs["image_hidden_states"],
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        tile_grids: Tensor | None = None,
        record_ids: Sequence[str] | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass images in the first step only: later ones find them in the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs.get("pixel_values") is not None:
            inputs["tile_grids"] = tile_grids
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row `expand_size` times, its images with it (beams, several replies)."""
        names = ("pixel_values", "tile_grids", "image_sizes")
        images = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        if images and expand_size > 1:
            images = self._repeat_images(input_ids, expand_size, **images)
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return ids, {**kwargs, **images}

    def _repeat_images(
        self,
        input_ids: Tensor,
        expand_size: int,
        pixel_values: Tensor,
        tile_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Repeat the images of each row as a block: a plain repeat would mix up the views."""
        parts = self.model
        tile_grids, image_sizes = parts._with_defaults(pixel_values, tile_grids, image_sizes)
        tokens = (input_ids == self.config.image_token_id).sum(-1).tolist()
        per_row = images_per_row(tokens, parts.count_image_tokens(tile_grids, image_sizes))
        views = [parts.tiling.plan_of_grid(tuple(g)).num_views for g in tile_grids.tolist()]
        order = [
            image
            for row, count in enumerate(per_row)
            for _ in range(expand_size)
            for image in range(sum(per_row[:row]), sum(per_row[:row]) + count)
        ]
        blocks = pixel_values.split(views)
        return {
            "pixel_values": torch.cat([blocks[image] for image in order]),
            "tile_grids": tile_grids[order],
            "image_sizes": image_sizes[order],
        }


def _trains(module: nn.Module) -> bool:
    """Return whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _trains_vision(model: VlmModel) -> bool:
    """Return whether anything before the language model is trained."""
    newline = model.tiling.has_newline and model.image_newline.requires_grad
    return newline or _trains(model.vision_tower) or _trains(model.connector)


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the type a module computes in; quantised weights are skipped."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
