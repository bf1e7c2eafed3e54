"""How does a language model get more tokens than it has?"""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel


def enlarge_vocabulary(language_model: PreTrainedModel, vocab_size: int) -> None:
    """Add random rows to the embedding and the head."""
    if language_model.config.model_type != "xlstm":
        language_model.resize_token_embeddings(vocab_size, mean_resizing=False)
        return
    # transformers 5.23 cannot: xLSTM's `_init_weights` fills the old embedding, not the new one.
    embedding = cast(nn.Embedding, language_model.get_input_embeddings())
    head = cast(nn.Linear, language_model.get_output_embeddings())
    num_new, dim = vocab_size - embedding.num_embeddings, embedding.embedding_dim
    tied = head.weight is embedding.weight
    for module in (embedding, head):
        rows = torch.randn(num_new, dim) * (2 / (5 * dim)) ** 0.5  # its own initialisation
        module.weight = nn.Parameter(torch.cat([module.weight.detach(), rows.to(module.weight)]))
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = language_model.config.vocab_size = vocab_size
