"""Multi-candidate speculative decoding in plain PyTorch (Yang et al. 2024, arXiv 2401.06706, section 3.2).

A cheap draft proposes a tree of candidate tokens, the target scores the whole tree in one forward, and recursive
rejection sampling accepts one path of it. The output follows the target's distribution exactly, whatever the draft.
Both are causal models of transformers (full attention, float32) with one vocabulary. For clarity, no KV cache is kept.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig


@torch.no_grad()
def forward(model: nn.Module, tokens: list[int], parents: list[int]) -> Tensor:
    """Next-token probabilities [N, V] after each of the N nodes of a tree."""
    mask = torch.eye(len(tokens), dtype=torch.bool)  # [N, N]: a node sees itself ...
    for node, parent in enumerate(parents):
        mask[node] |= mask[parent]  # ... and its ancestors, not its siblings
    positions = mask.sum(1) - 1  # [N]: depth in the tree, the same for siblings
    bias = torch.where(mask, 0.0, -torch.inf)  # added to the attention scores
    logits: Tensor = model(torch.tensor([tokens]), attention_mask=bias[None, None], position_ids=positions[None]).logits
    return logits[0].softmax(-1)


def speculative_step(target: nn.Module, draft: nn.Module, prompt: list[int], counts: tuple[int, ...]) -> list[int]:
    """1 to len(counts) + 1 new tokens for one forward of the target; a node at depth d has counts[d] candidates."""
    root = len(prompt) - 1
    tokens, parents = list(prompt), [0, *range(root)]  # the prompt is a chain that ends in the root
    q: dict[int, Tensor] = {}  # candidate -> the distribution [V] that it was drawn from

    level = range(root, root + 1)
    for count in counts:  # draft level by level
        q_level = forward(draft, tokens, parents)  # [N, V]
        for node in level:
            q_j = q_level[node]  # q_1 = q
            for _ in range(min(count, int(q_j.count_nonzero()))):
                x_j = torch.multinomial(q_j, 1)  # x_j ~ q_j
                q[len(tokens)] = q_j
                tokens.append(int(x_j))
                parents.append(node)
                q_j = q_j.index_fill(0, x_j, 0.0)  # without replacement: q_{j+1}(x_j) = 0
                q_j = q_j / q_j.sum()
        level = range(level.stop, len(tokens))

    p = forward(target, tokens, parents)  # [N, V]: all candidates scored at once
    node, r_j, accepted = root, p[root], []  # r_1 = p
    for candidate, q_j in q.items():  # verify level by level, siblings in draw order
        if parents[candidate] != node:
            continue  # not a child of the last accepted node
        token = tokens[candidate]
        if torch.rand(()) < r_j[token] / q_j[token]:  # accept x_j with probability min(1, r_j(x_j) / q_j(x_j))
            accepted.append(token)
            node, r_j = candidate, p[candidate]
        elif (residual := (r_j - q_j).clamp(min=0)).any():  # all 0 if r_j = q_j up to rounding: keep r_j
            r_j = residual / residual.sum()  # r_{j+1} = norm((r_j - q_j)+)
    return [*accepted, int(torch.multinomial(r_j, 1))]  # from the residual if all were rejected; at a leaf from p


def generate(
    target: nn.Module, draft: nn.Module, prompt: list[int], max_new_tokens: int, counts: tuple[int, ...]
) -> tuple[list[int], int]:
    """The new tokens, and how many forwards of the target they took."""
    new: list[int] = []
    steps = 0
    while len(new) < max_new_tokens:
        new += speculative_step(target, draft, prompt + new, counts)
        steps += 1
    return new[:max_new_tokens], steps


if __name__ == "__main__":  # a tiny random target; the draft is a noisy copy of it
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    target, draft = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    draft.load_state_dict({name: w + 0.01 * torch.randn_like(w) for name, w in target.state_dict().items()})
    new, steps = generate(target, draft, prompt=[1, 2, 3], max_new_tokens=64, counts=(4, 2, 2))
    print(*new)
    print(f"{len(new)} tokens in {steps} forwards of the target")
