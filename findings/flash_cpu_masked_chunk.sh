#!/usr/bin/env bash
# CPU flash attention reports a log-sum-exp of 0 for a chunk of keys that is masked out entirely.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: the second output of `aten._scaled_dot_product_flash_attention_for_cpu` is the log-sum-exp of the scores.
# If the mask removes every key, that is log 0 = -inf, as `torch.logsumexp` and `flex_attention` say.
# Then attention over chunks of the keys can be merged by weights exp(lse_chunk - lse_total), as ring attention does.
#
# Seen: the log-sum-exp is 0.0, a plausible score. The output of the chunk is zero, as it should be.
# So the merge gives the empty chunk the weight of a real one and shrinks the result, with no error and no NaN.
# If every chunk holds at least one key, the same merge is exact.
#
# Output: log-sum-exp of a masked chunk: flash 0.0, flex -inf; error of the merge: 0.40 (no masked chunk: 2.4e-07)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

warnings.simplefilter("ignore")  # flex_attention asks to be compiled.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
torch.manual_seed(0)
query, key, value = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)


def merge_error(visible_keys: int) -> float:
    """Largest error of attention merged from two chunks of 4 keys, if only the first `visible_keys` may be seen."""
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., visible_keys:] = -torch.inf
    chunks = [
        flash(query, key[:, :, part], value[:, :, part], attn_mask=mask[..., part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    total = torch.logsumexp(torch.stack([lse for _, lse in chunks]), dim=0)
    merged = sum(output * (lse - total).exp().unsqueeze(-1) for output, lse in chunks)
    return (merged - scaled_dot_product_attention(query, key, value, attn_mask=mask)).abs().max().item()


output, lse = flash(query, key, value, attn_mask=torch.full((1, 1, 6, 8), -torch.inf))
no_key = create_block_mask(lambda batch, head, row, column: column < 0, 1, 1, 6, 8, device="cpu")
_, flex = flex_attention(query, key, value, block_mask=no_key, return_aux=AuxRequest(lse=True))
wrong, right = merge_error(4), merge_error(5)
print(f"log-sum-exp of a masked chunk: flash {lse.max().item()}, flex {flex.lse.max().item()}; "
      f"error of the merge: {wrong:.2f} (no masked chunk: {right:.1e})")
assert torch.equal(lse, torch.zeros_like(lse)) and torch.equal(output, torch.zeros_like(output))
assert torch.equal(flex.lse, torch.full_like(flex.lse, -torch.inf))
assert wrong > 0.1 and right < 1e-5
PY
"$folder/venv/bin/python" -I "$folder/check.py"
