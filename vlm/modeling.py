"""What is the model? The parts of `base_model`, the head, the loss and generation.

Shapes: B batch, L sequence, T views of all images of the batch, n images, S view size, E language-
model width, V vocabulary.

Surprise: with `labels`, `logits` is None, because only supervised positions reach the head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from connectors import ConnectorChoice, acts_inside, build_connector, resolve_connector_config
from vlm.base_model import VlmModel, VlmPreTrainedModel
from vlm.configuration import VlmConfig
from vlm.encoders import VisionEncoder
from vlm.errors import UserError
from vlm.hosts import host_shape, linear_of
from vlm.instructions import IDS, MASK
from vlm.last_layer import LastLayer
from vlm.lm_head import document_starts, logit_transform, supervised, supervised_loss
from vlm.on_base import Base, save_trained, stands_on_base
from vlm.recurrent_lm import check_state_cache
from vlm.sharding import agreement
from vlm.state_cache import new_cache
from vlm.tied_head import look_up
from vlm.tiling import plan_of
from vlm.token_layout import images_per_row
from vlm.vocabulary import enlarge_vocabulary


@dataclass
class VlmOutput(CausalLMOutputWithPast):
    """What `forward` returns; `image_hidden_states` are the features (image tokens, E)."""

    image_hidden_states: Tensor | None = None


class VlmForConditionalGeneration(VlmPreTrainedModel, GenerationMixin):
    """The whole model: `VlmModel`, the language-model head, the loss and generation."""

    accepts_loss_kwargs = True
    on_base: Base | None = None  # the frozen weights that it stands on, if they lie elsewhere

    def __init__(self, config: VlmConfig) -> None:
        """Build the architecture of `config` with random weights."""
        super().__init__(config)
        self.model = VlmModel(config)
        text = config.text_config
        assert isinstance(text, PreTrainedConfig), "a model needs the config of its language model"
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._declare_tied_weights()
        self._transform = logit_transform(text)
        self._last_layer = LastLayer()
        self.chunk_elements: int | None = None  # see `supervised_loss`
        self._is_stateful = self.model.language_model._is_stateful  # no assisted generation then
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
        vision_encoder: VisionEncoder,
        connector_config: ConnectorChoice,
        language_model: PreTrainedModel,
        tiling: Mapping[str, Any],
        image_token_id: int,
        vocab_size: int,
        video: Mapping[str, Any] | None = None,
    ) -> "VlmForConditionalGeneration":
        """Join loaded parts with a new connector; the parts are used, not copied.

        Args:
            vision_encoder: with its weights.
            connector_config: `{"type": ..., fields}` or a list of them; the weights are new.
            language_model: any `AutoModelForCausalLM`; its embedding is enlarged if it is smaller
                than the vocabulary.
            tiling: `{"type": ..., fields}`.
            image_token_id: id of the image token.
            vocab_size: `len(tokenizer)`.
            video: fields of `VideoConfig`; None: the defaults.

        Raises:
            UserError: the language model's logits are not those of its head (see `lm_head.py`).
        """
        embedding: Any = language_model.get_input_embeddings()
        if embedding.num_embeddings < vocab_size:
            enlarge_vocabulary(language_model, vocab_size)
        head: Any = language_model.get_output_embeddings()
        config = VlmConfig(
            vision_config=dict(vision_encoder.config),
            connector_config=resolve_connector_config(connector_config),
            text_config=language_model.config,
            tiling=dict(tiling),
            video=None if video is None else dict(video),
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
        parts.set_language_model(cast(PreTrainedModel, language_model.base_model))
        host = host_shape(parts.language_model) if acts_inside(connector_config) else None
        parts.connector = build_connector(connector_config, vision_encoder.dims, text_dim, host)
        parts.connector.to(language_model.device, language_model.dtype)
        parts.connector.begin_from(partial(linear_of, parts.language_model))
        with torch.device(language_model.device):
            parts.renew_row_ends(language_model.dtype)
        model.lm_head = head
        model.tie_weights()
        model.generation_config = language_model.generation_config
        if parts.state_traits is not None:
            check_state_cache(parts.language_model, parts.state_traits)
        model._compare_logits(language_model)
        return model

    @torch.no_grad()
    def _compare_logits(self, language_model: PreTrainedModel) -> None:
        """Check on three tokens that our head gives the language model's own logits."""
        ids = torch.arange(3, device=language_model.device)[None]
        was_training = language_model.training
        language_model.eval()
        theirs = language_model(ids, use_cache=False).logits
        hidden = language_model.base_model(ids, use_cache=False).last_hidden_state
        language_model.train(was_training)
        ours = self.compute_logits(hidden)
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
            raise UserError(
                f"{type(language_model).__name__} does more to its logits than its head does, "
                "which is not known here; name the rule in vlm/lm_head.py"
            )

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a whole checkpoint, as transformers does.

        Raises:
            UserError: it holds what was trained alone, which transformers would not find.
        """
        source = pretrained_model_name_or_path
        if stands_on_base(source):
            raise UserError(
                f"{source} holds only what was trained; load it with vlm.load_model, or make "
                f"a whole one of it: vlm merge {source} --out DIR"
            )
        return super().from_pretrained(source, *args, **kwargs)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a checkpoint; of a model on a base, what was trained alone (vlm/on_base.py)."""
        if self.on_base is None:
            super().save_pretrained(save_directory, is_main_process, **kwargs)
        elif is_main_process:
            state = kwargs.get("state_dict")
            save_trained(self, self.on_base, Path(save_directory), state)

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def get_image_features(
        self, pixel_values: Tensor, tile_grids: Tensor, image_sizes: Tensor, **text: Tensor | None
    ) -> list[Tensor]:
        """Return each image's token embeddings; see `VlmModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, tile_grids, image_sizes, **text)

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
        vision_features: Sequence[Tensor] | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
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
            tile_grids: (n, 2) rows and columns of tiles per image; (0, f): a video of f frames.
            image_sizes: (n, 2) height and width in pixels per image.
            vision_features: instead of pixel_values, what the frozen vision tower made of the
                views: a map (T, H, W, D) each; T may be 0. Not for `generate`.
            qformer_input_ids: (n, L') each image's instruction, where the connector reads it.
            qformer_attention_mask: (n, L') 0 on padding of these.
            labels: (B, L) ids to predict, -100 elsewhere; unshifted.
            loss_weights: (B, L) what each label's loss is multiplied by; None: 1.
            logits_to_keep: how many last positions get logits (0: all), or their indices.
            num_items_in_batch: divides the summed loss; None: the (weighted) mean of this batch.
            record_ids: names of the rows, for errors.
            **kwargs: to the language model.

        Raises:
            UserError: image tokens and image features differ in number.
        """
        token_embeds, head_weight, agree, starts = None, None, None, None
        if labels is not None:
            kwargs["use_cache"] = False
            starts = document_starts(position_ids, attention_mask)
            if not acts_inside(self.config.connector_config):
                learnt = supervised(labels, starts)
                kwargs |= self._last_layer.ask(self.model.language_model, learnt, kwargs)
            agree = agreement(self, labels.device)
            if input_ids is not None and self._transform is None and agree is None:
                embedding = self.get_input_embeddings()
                token_embeds, head_weight = look_up(embedding, self.lm_head, input_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            tile_grids=tile_grids,
            image_sizes=image_sizes,
            vision_features=vision_features,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            record_ids=record_ids,
            token_embeds=token_embeds,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = supervised_loss(
                hidden,
                labels.to(hidden.device),
                self.lm_head if self._transform is None else self.compute_logits,
                self.config.text_config.vocab_size,
                num_items_in_batch,
                starts,
                loss_weights,
                self.chunk_elements,
                agree=agree,
                head_weight=head_weight,
            )
        else:
            logits = self.compute_logits(slice_logits_to_keep(hidden, logits_to_keep))
        return VlmOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs["image_hidden_states"],
        )

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Make the cache of a language model without attention, which transformers takes for one.

        It goes by the name of the class, and this class may hold any language model.
        """
        traits = self.model.state_traits
        if (
            traits is not None
            and not traits.has_keys
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and model_kwargs.get("past_key_values") is None
        ):
            model_kwargs["past_key_values"] = new_cache(self.model.language_model, traits)
            return
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *args
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        tile_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass images in the first step only: later ones find them in the cache.

        `inputs_embeds` is named because `generate` looks for the name in this signature.
        """
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("pixel_values") is not None:
            inputs["tile_grids"] = tile_grids
        return inputs

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row `expand_size` times, its images with it (beams, several replies)."""
        names = ("pixel_values", "tile_grids", "image_sizes", IDS, MASK)
        images = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        if images and expand_size > 1:
            assert input_ids is not None, "images come with ids"
            images = self._repeat_images(input_ids, expand_size, **images)
        ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
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
        **per_image: Tensor,
    ) -> dict[str, Tensor]:
        """Repeat the images of each row as a block: a plain repeat would mix up the views."""
        parts = self.model
        tile_grids, image_sizes = parts.with_default_grids(pixel_values, tile_grids, image_sizes)
        tokens = (input_ids == self.config.image_token_id).sum(-1).tolist()
        per_row = images_per_row(tokens, parts.count_image_tokens(tile_grids, image_sizes))
        views = [plan_of(parts.tiling, tuple(g)).num_views for g in tile_grids.tolist()]
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
            **{name: value[order] for name, value in per_image.items()},
        }
