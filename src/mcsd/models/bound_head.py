"""A draft head bound to its target: the model that `mcsd.drafters.HeadDrafter` drafts with."""

import torch
from torch import Tensor, nn

from mcsd.errors import UnsupportedModel, VocabularyMismatch
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.draft_vocabulary import input_size, output_rows
from mcsd.models.kv_cache import CacheView, KVCache
from mcsd.models.layout import TokenLayout
from mcsd.models.masks import make_masks
from mcsd.models.protocol import DecoderModel, LanguageModel, ModelOutput
from mcsd.models.transformers import attention_backends


class BoundHead:
    """A draft head bound to its target, ready to draft.

    Args:
        head: the trained part; it is moved to the target's dtype and device.
        target: whose hidden states it reads.
        name: shown to users.
        precision: weight format and kernels, for people; by default the dtype.

    Raises:
        VocabularyMismatch, UnsupportedModel: it belongs to another target.
    """

    def __init__(self, head: DraftHead, target: LanguageModel, name: str, precision: str | None = None) -> None:
        self.target = check_target(head.config, target, name)
        self.name = name
        self.precision = precision or str(self.target.dtype).removeprefix("torch.")
        self.device = target.device
        self.captures: bool = getattr(target, "captures", False)
        self._attention_backends = attention_backends(self.device)
        self.config = head.config
        self.dtype: torch.dtype = self.target.dtype
        self.head = head.to(self.device, self.dtype).eval()
        self.vocabulary: Tensor = head.vocabulary.to(self.device, torch.int64)
        """int64 ``[K]``, the token of each logit."""
        self.embed_tokens: nn.Module = self.target.embed_tokens if head.embed_tokens is None else head.embed_tokens
        own: nn.Module | None = self.head.lm_head
        self.lm_head: nn.Module = (
            output_rows(self.target.lm_head, self.vocabulary).to(self.dtype) if own is None else own
        )

    @property
    def weights(self) -> nn.Module:
        """See `DecoderModel`."""
        return nn.ModuleList([self.head, self.lm_head])

    def new_cache(self, max_batch: int, max_tokens: int) -> KVCache:
        """An empty cache; see `LanguageModel.new_cache`."""
        return KVCache(self.config.num_layers, max_batch, max_tokens, self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        layout: TokenLayout,
        cache: KVCache,
        sequences: slice = slice(None),
        logits: bool = True,
        own: bool = False,
    ) -> ModelOutput:
        """Read in-flight tokens; see `LanguageModel.forward`.

        Args:
            tokens: int64 ``[B, n]``.
            hidden: hidden states one position before each token: the target's ``[B, n, F]``, or, if ``own``, the
                head's ``[B, n, H]``. The first token of a text has none, and any serve.
            layout, cache, sequences: as there.
            logits: whether to compute logits.

        Returns:
            Logits ``[B, n, K]`` of `vocabulary`, of all columns or none, and the head's own hidden states.
        """
        view = cache.view(slice(*sequences.indices(cache.batch_size)), layout)
        return self._run(self.embed_tokens(tokens), hidden, layout, view, logits, own)

    def _run(
        self, embedding: Tensor, hidden: Tensor, layout: TokenLayout, view: CacheView, logits: bool, own: bool
    ) -> ModelOutput:
        masks = make_masks(layout, view.lengths, view.columns, self.dtype, skips_first=self.config.skips_first)
        state = hidden if own else self.head.project_features(hidden)
        with self._attention_backends():
            output = self.head(state, embedding, masks.full, masks.positions, view)
        return ModelOutput(self.lm_head(self.head.normalize(output if logits else output[:, :0])), output)


def check_target(config: HeadConfig, target: LanguageModel, name: str) -> DecoderModel:
    """The target of a head.

    Raises:
        VocabularyMismatch, UnsupportedModel: the head belongs to another target.
    """
    if not isinstance(target, DecoderModel):
        raise UnsupportedModel(f"draft {name} is a head; {target.name} has no hidden states", "choose another draft")
    belongs = f"it belongs to {config.target:.80}; make one with: mcsd distill"
    if config.target_vocab_size != target.vocab_size:
        raise VocabularyMismatch(
            f"draft {name} is a head for {config.target_vocab_size} tokens, target {target.name} has "
            f"{target.vocab_size}",
            belongs,
        )
    width = input_size(target.lm_head)
    embedding = config.hidden_size if config.own_embeddings else input_size(target.embed_tokens)
    if config.feature_size != width or config.hidden_size != embedding:
        raise UnsupportedModel(
            f"draft {name} reads hidden states of size {config.feature_size} and embeddings of {config.hidden_size}, "
            f"target {target.name} has {width} and {embedding}",
            belongs,
        )
    layers = target.num_layers
    if config.kind == "eagle3" and not all(0 <= layer < layers for layer in config.hidden_layers):
        # Models return the output of their last layer only normalized.
        raise UnsupportedModel(
            f"draft {name} reads the inputs of layers {config.hidden_layers}, target {target.name} has layers 0 to "
            f"{layers - 1}",
            belongs,
        )
    if not all(-1 <= layer <= layers for layer in config.hidden_layers):
        raise UnsupportedModel(
            f"draft {name} reads layer {max(config.hidden_layers)}, target {target.name} has {layers}", belongs
        )
    return target
