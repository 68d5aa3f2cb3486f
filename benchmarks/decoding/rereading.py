"""Against the protocol of the published code: both models read the whole text again for every token.

The published loop keeps no cache: the base reads the text for every token, and the assistant reads it for every
deferred one. Its time is measured on every --stride-th token of the very text that our loop wrote, and scaled by the
stride.

    COLLM_DATA=data python -m benchmarks.decoding.rereading
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.decoding.common import finish, gsm8k_prompts, load_pair, seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--cut", type=float, default=0.6)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()
    base, big, tokenizer = load_pair(device=settings.device)
    ids = torch.tensor(gsm8k_prompts(tokenizer, 1), device=settings.device)

    def ours(speculate: bool):
        return base.generate(
            input_ids=ids, assistant=big, router=f"entropy:cut={settings.cut}", max_new_tokens=settings.new_tokens,
            do_sample=False, eos_token_id=None, speculate=speculate, return_dict_in_generate=True,
        )  # fmt: skip

    plain, out = seconds(lambda: ours(False))
    fast, _ = seconds(lambda: ours(True))
    prompt, rereading = ids.shape[1], 0.0
    for step in range(0, settings.new_tokens, settings.stride):
        text = out.sequences[:, : prompt + step]
        rereading += (
            settings.stride * seconds(lambda text=text: base(input_ids=text, use_cache=False, logits_to_keep=1))[0]
        )
    deferred = (out.source[0] == 1).nonzero().squeeze(1).tolist()
    for step in deferred[:: settings.stride]:
        text = out.sequences[:, : prompt + step]
        took, _ = seconds(lambda text=text: big(input_ids=text, use_cache=False, logits_to_keep=1))
        rereading += took * len(deferred) / len(deferred[:: settings.stride])
    finish("rereading", vars(settings), {
        "deferral_rate": round(len(deferred) / settings.new_tokens, 3),
        "rereading_seconds": round(rereading, 1), "plain_seconds": round(plain, 1),
        "speculation_seconds": round(fast, 1),
        "plain_times_faster": round(rereading / plain, 1), "speculation_times_faster": round(rereading / fast, 1),
    })  # fmt: skip


if __name__ == "__main__":
    main()
