"""What runs before the language-model head: encoder, connector, layout, language model?

Shapes: B batch, L sequence, T views of all images of the batch, n images, S view size, N tokens per
view, E language-model width.

Surprises: a frozen encoder runs without gradients and stays in eval mode; text-only batches send
one blank view through the vision side while it trains, so that all ranks run the same parameters.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from connectors import ConnectorChain, acts_inside, build_connector
from connectors.chain import Plugged
from connectors.float32 import float32_modules
from connectors.views import NOTHING_KNOWN, TextInput, Views
from vlm import fusion_cache, recurrent_lm
from vlm.configuration import VlmConfig
from vlm.encoders import build_vision_encoder
from vlm.fusion import Images, build_context, carry
from vlm.fusion_hooks import ARGUMENT, FusionCall, FusionHooks
from vlm.hosts import host_shape
from vlm.lm_head import document_starts
from vlm.mamba_scan import use_scan
from vlm.packed_attention import packed_mask, use_packed_attention
from vlm.pretrained import VlmPreTrainedModel
from vlm.row_ends import RowEnds, new_row_ends, put_row_ends, row_end_tokens
from vlm.sharding import weights_are_sharded
from vlm.shared_positions import explicit_mask, shared_positions
from vlm.state_cache import goes_on, state_traits
from vlm.tiling import build_tiling, plan_of
from vlm.token_layout import images_per_row, lay_out, num_image_tokens
from vlm.video_layout import VideoConfig, parse_video
from vlm.view_facts import as_text, describe_views, of_a_blank


class VlmModel(VlmPreTrainedModel):
    """Vision tower, connector and bare language model: everything but the head."""

    def __init__(self, config: VlmConfig) -> None:
        """Build the architecture of `config` with random weights."""
        super().__init__(config)
        assert config.vision_config and config.connector_config and config.tiling, config
        assert isinstance(config.text_config, PreTrainedConfig), config
        self.tiling = build_tiling(config.tiling)
        self.video = parse_video(config.video)
        self.vision_tower = build_vision_encoder(config.vision_config)
        text_dim = config.text_config.hidden_size
        language_model = AutoModel.from_config(config.text_config)
        self.connector = build_connector(
            config.connector_config,
            self.vision_tower.dims,
            text_dim,
            host_shape(language_model) if acts_inside(config.connector_config) else None,
        )
        self.set_language_model(language_model)
        self._hooks = FusionHooks()
        self.renew_row_ends()
        # `from_pretrained` makes new tensors, so modules that stay float32 are named to it.
        self._keep_in_fp32_modules_strict = float32_modules(self.connector, "connector")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def set_language_model(self, language_model: PreTrainedModel) -> None:
        """Put a bare language model in its place; Mamba-1 layers in it will run on our scan."""
        self.language_model = use_packed_attention(use_scan(language_model))
        self.state_traits = state_traits(language_model)  # None: attention alone

    def renew_row_ends(self, dtype: torch.dtype | None = None, keep: bool = False) -> None:
        """Make the learned ends of rows new, as the parts want them; `keep` those that are here."""
        wanted = new_row_ends(self.tiling, self.connector.itself(), self.video, dtype)
        put_row_ends(self, dict(wanted), keep)

    def set_video(self, video: VideoConfig) -> None:
        """Look at videos in another way; a newline that is now needed begins as a new one."""
        self.video, self.config.video = video, asdict(video)
        self.renew_row_ends(_dtype(self.connector), keep=True)

    def _row_ends(self) -> RowEnds:
        """Return what ends rows of tokens in the sequence."""
        learned = {
            name: vector.to(_dtype(self.connector))
            for name, vector in self.named_parameters(recurse=False)
        }
        return row_end_tokens(learned, self.connector.itself())

    def train(self, mode: bool = True) -> "VlmModel":
        """Set the mode of all parts; a frozen vision tower stays in eval mode."""
        super().train(mode)
        if mode and not _trains(self.vision_tower):
            self.vision_tower.eval()
        return self

    def view_token_grid(self) -> tuple[int, int]:
        """Return (h, w), the grid of tokens that the connector makes of one view."""
        return self.connector.view_token_grid(self.vision_tower.grids)

    def get_view_tokens(self, pixel_values: Tensor, views: Views = NOTHING_KNOWN) -> Tensor:
        """Encode and project views (T, 3, S, S), of which `views` tells, to tokens (T, N, E)."""
        return self._plug(pixel_values, views).tokens

    def _plug(
        self,
        pixel_values: Tensor | None,
        views: Views,
        vision_features: Sequence[Tensor] | None = None,
    ) -> Plugged:
        """Encode views (T, 3, S, S); return tokens, and what the language model's layers read."""
        if vision_features is None:
            assert pixel_values is not None, "views or their features"
            frozen = not (_trains(self.vision_tower) or pixel_values.requires_grad)
            with torch.no_grad() if frozen else nullcontext():
                vision_features = self.vision_tower(pixel_values.to(_dtype(self.vision_tower)))
        assert vision_features is not None
        features = [feature.to(_dtype(self.connector)) for feature in vision_features]
        made = self.connector(features, views)
        return made if isinstance(made, Plugged) else Plugged(made, {})

    def get_image_features(
        self,
        pixel_values: Tensor,
        tile_grids: Tensor,
        image_sizes: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Return each image's token embeddings, (num_image_tokens, E), in order.

        Args:
            pixel_values: (T, 3, S, S) views of all images, one image after the other.
            tile_grids: (n, 2) rows and columns each image was cut into.
            image_sizes: (n, 2) height and width of each image.
            qformer_input_ids: (n, L) each image's instruction, where the connector reads it.
            qformer_attention_mask: (n, L) 0 on padding of these.
        """
        text = as_text(qformer_input_ids, qformer_attention_mask)
        tokens = self._plug(pixel_values, self._views(tile_grids, image_sizes, text)).tokens
        return self._lay_out(tokens, tile_grids, image_sizes, self._row_ends())

    def _views(self, tile_grids: Tensor, image_sizes: Tensor, text: TextInput | None) -> Views:
        """Return what the connector reads of the views; see `get_image_features`."""
        reads, grids = self.connector.itself().reads, self.vision_tower.grids
        return describe_views(reads, self.tiling, tile_grids, image_sizes, grids, text)

    def _lay_out(
        self,
        tokens: Tensor,
        tile_grids: Tensor,
        image_sizes: Tensor,
        ends: RowEnds,
        window: int = 1,
    ) -> list[Tensor]:
        """Join views' tokens (T, N, E) image by image, with the ends (E,) of rows."""
        grids = [tuple(grid) for grid in tile_grids.tolist()]
        num_views = [plan_of(self.tiling, grid).num_views for grid in grids]
        if sum(num_views) != len(tokens):
            raise ValueError(
                f"tile_grids {grids} mean {sum(num_views)} views, but pixel_values has "
                f"{len(tokens)}"
            )
        size, token_grid = self.vision_tower.image_size, self.view_token_grid()
        return [
            lay_out(
                views,
                *((width, height), self.tiling, size, token_grid),
                newline=ends.newline,
                grid=grid,
                separator=ends.separator,
                video=self.video,
                window=window,
            )
            for views, (height, width), grid in zip(
                tokens.split(num_views), image_sizes.tolist(), grids, strict=True
            )
        ]

    def _beside(self, tile_grids: Tensor, image_sizes: Tensor, side: Tensor) -> Tensor:
        """Return what stands beside each image token, (K, ...), of `side`; 0 beside a row's end.

        Args:
            tile_grids: (n, 2) rows and columns each image was cut into.
            image_sizes: (n, 2) height and width of each image.
            side: (T, N, C) or (T, N, R * R, V), see `connectors.base.Connector.side`. Where tokens
                are pooled or shrunk, so is it.
        """
        shape = side.shape[2:]
        window = math.isqrt(shape[0]) if len(shape) == 2 else 1
        numbers = side.flatten(2)
        nothing = numbers.new_zeros(numbers.shape[2])
        ends = RowEnds(nothing, nothing)
        laid_out = torch.cat(self._lay_out(numbers, tile_grids, image_sizes, ends, window))
        return laid_out.unflatten(1, shape)

    def count_image_tokens(self, tile_grids: Tensor, image_sizes: Tensor) -> list[int]:
        """Return how many tokens each image takes; see `get_image_features` for the arguments."""
        known = (self.tiling, self.vision_tower.image_size, self.view_token_grid())
        return [
            num_image_tokens((width, height), *known, tuple(grid), self.video)
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
        vision_features: Sequence[Tensor] | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        record_ids: Sequence[str] | None = None,
        token_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Embed the ids, put image features where the image tokens are, run the language model.

        The arguments are those of `VlmForConditionalGeneration.forward`; `token_embeds` (B, L, E)
        are the ids' embeddings, where it has looked them up itself.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds, token_embeds)  # (B, L, E)
        is_image = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool).to(inputs_embeds.device)
        features, images, sharded = None, None, weights_are_sharded(self)
        if pixel_values is not None and vision_features is not None:
            raise ValueError("give either pixel_values or vision_features, not both")
        seen = pixel_values if vision_features is None else vision_features[0]
        if seen is not None and len(seen):
            if input_ids is None:
                raise ValueError("images need input_ids: image tokens are found by their id")
            tile_grids, image_sizes = self.with_default_grids(seen, tile_grids, image_sizes)
            is_image = input_ids == self.config.image_token_id  # (B, L)
            counts = self.count_image_tokens(tile_grids, image_sizes)
            per_row = images_per_row(is_image.sum(-1).tolist(), counts, record_ids)
            text = as_text(qformer_input_ids, qformer_attention_mask)
            facts = self._views(tile_grids, image_sizes, text)
            tokens, sides = self._plug(pixel_values, facts, vision_features)
            laid_out = self._lay_out(tokens, tile_grids, image_sizes, self._row_ends())
            features = torch.cat(laid_out)
            features = features.to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features)
            views = [plan_of(self.tiling, tuple(g)).num_views for g in tile_grids.tolist()]
            beside = partial(self._beside, tile_grids, image_sizes)
            images = Images(counts, views, per_row, beside, sides)
        elif (self.training and _trains_vision(self)) or (sharded and not goes_on(past_key_values)):
            inputs_embeds = inputs_embeds + self._blank_view_term(vision_features).to(inputs_embeds)

        chain, carried, context, shared = self.connector.itself(), None, None, None
        if isinstance(chain, ConnectorChain) and chain.acts_inside:
            self._hooks.attach(self.language_model, chain)
            run_all = self.training or sharded
            carried = fusion_cache.read(past_key_values)
            context = build_context(
                chain, is_image, images, attention_mask, position_ids, carried, run_all
            )
            kwargs[ARGUMENT] = FusionCall(chain, context)
            if chain.shares_positions:
                shared = shared_positions(
                    self.language_model, context, position_ids, past_key_values, carried
                )
        outputs = self._run_language_model(
            inputs_embeds, attention_mask, position_ids, past_key_values, shared, **kwargs
        )
        if context is not None and outputs.past_key_values is not None:
            fusion_cache.write(outputs.past_key_values, carry(context, images, carried))
        outputs["image_hidden_states"] = features
        return outputs

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_embeds: Tensor | None
    ) -> Tensor:
        """Return the embeddings (B, L, E) that were given, or those of the ids."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if token_embeds is not None:
            return token_embeds
        return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds

    def _run_language_model(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        shared: Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model on embeddings (B, L, E), packed documents apart.

        `shared` (B, L) are its positions, where they are not `position_ids`.
        """
        inputs: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if self.state_traits is not None:
            return recurrent_lm.run(self.language_model, self.state_traits, **inputs)
        packed = past_key_values is None and (
            document_starts(position_ids, attention_mask) is not None
        )
        if packed:
            # Where our mask is None transformers builds the block-diagonal one (or the sequence
            # lengths of flash attention) from position_ids, but only without a cache.
            assert position_ids is not None
            mask = packed_mask(self.language_model, position_ids, attention_mask)
            inputs |= {"attention_mask": mask, "use_cache": False}
        if shared is not None:
            inputs["position_ids"] = shared
            if inputs["attention_mask"] is None:
                apart = position_ids if packed else None
                inputs["attention_mask"] = explicit_mask(
                    self.language_model, inputs_embeds, apart, past_key_values
                )
        return self.language_model(**inputs)

    def with_default_grids(
        self, views: Tensor, tile_grids: Tensor | None, image_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return grids and sizes; both may be left out where every image is one view (T, ...)."""
        if tile_grids is not None and image_sizes is not None:
            return tile_grids, image_sizes
        assert self.config.tiling is not None
        shape_matters = self.tiling.has_newline or (
            self.tiling.pads and "padding" in self.connector.itself().reads
        )
        if self.config.tiling["type"] not in ("resize", "pad") or shape_matters:
            raise ValueError(
                f"tiling {self.config.tiling['type']!r} needs tile_grids and image_sizes beside "
                "pixel_values"
            )
        ones = torch.ones(len(views), 2, dtype=torch.long, device=views.device)
        return ones, ones * self.vision_tower.image_size

    def _blank_view_term(self, vision_features: Sequence[Tensor] | None) -> Tensor:
        """Return 0 that depends on every parameter of the vision side.

        Distributed training expects gradients of the same parameters from every rank; a rank whose
        batch has no image would otherwise leave the others waiting. Where features (0, H, W, D)
        came in place of views, no rank runs the tower.
        """
        if vision_features is not None:
            vision_features = [maps.new_zeros(1, *maps.shape[1:]) for maps in vision_features]
        size = self.vision_tower.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        known = of_a_blank(self.connector.itself().reads, self.device)
        tokens, sides = self._plug(blank, known, vision_features)
        term = tokens.sum() + sum(x.sum() for side in sides.values() for x in side)
        return (term + sum(end.sum() for end in self._row_ends() if end is not None)) * 0.0


def _trains(module: nn.Module) -> bool:
    """Return whether any parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _trains_vision(model: VlmModel) -> bool:
    """Return whether anything before the language model is trained."""
    row_ends = any(vector.requires_grad for vector in model.parameters(recurse=False))
    return row_ends or _trains(model.vision_tower) or _trains(model.connector)


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the type a module computes in; quantised weights are skipped."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
