"""The arithmetic of KV pages: how many tokens need how many, and what a page weighs.

One pool of pages of equal bytes. A page holds page_tokens tokens of all layers of one kind, so a sequence has two page
tables: full layers keep every page, window layers give pages back as the window passes. Knows no tensors.
"""

from .plan import DTYPE_BYTES, KvDType
from .shards import Mesh, part
from .spec import Spec

VOID_TOKENS = 2  # at the end of a sequence, drawn before it was known that the draw before them has to be repeated


def layers_per_page(spec: Spec) -> int:
    """Layers of one kind that a page has room for; where the kinds differ in number, the larger."""
    return max(spec.layers_of("window"), spec.layers_of("full"))


def local_kv_heads(spec: Spec, mesh: Mesh, rank: int) -> int:
    heads = part(spec.kv_heads, 1, *mesh.place(rank)["tp"])
    return heads.stop - heads.start


def page_bytes(spec: Spec, mesh: Mesh, rank: int, kv_dtype: KvDType, page_tokens: int) -> int:
    """Keys and values of page_tokens tokens in layers_per_page layers, for the KV heads of `rank`."""
    heads = local_kv_heads(spec, mesh, rank)
    return layers_per_page(spec) * 2 * page_tokens * heads * spec.head_dim * DTYPE_BYTES[kv_dtype]


def full_pages(spec: Spec, tokens: int, page_tokens: int) -> int:
    """Pages that hold `tokens` tokens in full layers."""
    return -(-tokens // page_tokens) if spec.layers_of("full") else 0


def window_pages(spec: Spec, step_tokens: int, page_tokens: int) -> int:
    """Most pages that one sequence holds in window layers: a step's tokens, those that may be void, and the window
    before them, unaligned."""
    if not spec.layers_of("window"):
        return 0
    return -(-(spec.window_tokens - 1 + VOID_TOKENS + step_tokens) // page_tokens) + 1


def pool_pages(spec: Spec, kv_tokens: int, sequences: int, step_tokens: int, page_tokens: int) -> int:
    """Pages of a pool in which so many sequences of kv_tokens tokens together fit, whatever their steps.

    Each sequence but the first may waste a page at its end and holds a window; one step's tokens are anybody's.
    """
    others = (sequences - 1) * (1 + window_pages(spec, 1, page_tokens))
    return full_pages(spec, kv_tokens, page_tokens) + window_pages(spec, step_tokens, page_tokens) + others
