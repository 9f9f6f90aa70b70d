"""The text tower in torch: tokens in, one embedding out. Source: Radford et al., arXiv:2103.00020, section 2.4."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.recipe import Text


class TextEncoder(nn.Module):
    """A transformer that reads from left to right; the embedding is a projection of what its last token has read.

    So padding on the right changes nothing.
    """

    def __init__(self, settings: Text, dimension: int) -> None:
        """Build it with the paper's random weights.

        Args:
            settings: widths, and the numbers of tokens that it knows and takes.
            dimension: P of the embedding.
        """
        super().__init__()
        width = settings.width
        self.tokens = nn.Embedding(settings.vocabulary, width)
        self.positions = nn.Parameter(torch.randn(settings.max_length, width) * 0.01)
        self.blocks = nn.ModuleList(_Block(width, settings.heads, settings.layers) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dimension, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (M, P), not normalised, of tokens (M, T) with their mask (M, T)."""
        # Called as a module, the exporter would name this value embedding, which is the name of the output.
        x = self.tokens.weight[input_ids] + self.positions[: input_ids.shape[1]]  # (M, T, W)
        for block in self.blocks:
            x = block(x)
        last = attention_mask.sum(1, keepdim=True) - 1  # (M, 1)
        read = x.gather(1, last[:, :, None].expand(-1, -1, x.shape[2])).squeeze(1)  # (M, W)
        embeddings: Tensor = self.projection(self.norm(read))
        return embeddings


class _Block(nn.Module):
    """Attention to earlier tokens and an MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)
        added = width**-0.5 * (2 * layers) ** -0.5
        for layer, std in ((self.attention, width**-0.5), (self.out, added)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(wide.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(narrow.weight, std=added)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (M, heads, T, W / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        added: Tensor = x + self.mlp(self.second(x))
        return added


class UnitText(nn.Module):
    """The text tower as it is exported: its embeddings have length 1."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return F.normalize(self.encoder(input_ids, attention_mask).float(), dim=1)
