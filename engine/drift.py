"""How far a trained model is from the base model that it was trained from."""

import torch
from torch.nn import functional as F

import lora
from engine.chat import training_ids
from engine.packed import split_by_tokens, target_logits
from support import ranks


@torch.inference_mode()
def kl_drift(model, tokenizer, dialogues: list[tuple]) -> float:
    """Mean over response tokens of KL(base || tuned), in nats.

    `dialogues` are (user turn, the base model's response, and where they are known its tokens). Both models
    are `model`, with its adapter on and off.
    """
    rows = [training_ids(tokenizer, *dialogue) for dialogue in ranks.share(dialogues)]
    total, count = 0.0, 0
    for group in split_by_tokens(rows, tokens=2048):
        tuned, _ = target_logits(model, group, share_prefix=True)
        log_q = F.log_softmax(tuned.float(), dim=-1)  # [targets, vocab]
        with lora.disabled(model):
            base, _ = target_logits(model, group, share_prefix=True)
        log_p = F.log_softmax(base.float(), dim=-1)
        total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        count += len(log_p)
    total, count = ranks.totals(total, count)
    return total / count
