"""log p(continuation | context), as lm-evaluation-harness 0.4.13 computes it, for many options of many documents at once.

Covered: any Hugging Face causal model, the chat template, BOS, contexts that end in blanks, the harness's truncation.
Not covered: encoder-decoder models, rolling log-likelihoods.

Why it is fast. The inputs of a document's options form a tree: they share their context, and no token of a tree is computed
twice. A tree is one row of a batch, its nodes one after the other, each at the position of its depth, each attending to its
own ancestors and to nothing else. What all documents of a group share (an MMLU subject's header and shots, TruthfulQA's six
examples) is computed once and kept as keys and values. Trees are batched by size, and the output head runs only where a
token of a continuation is predicted. Models that cannot be used like this (sliding windows, state spaces, ALiBi: a short
trial tells) get every option as a row of its own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from support.cli import InputError

BATCH_TOKENS = {"cpu": 512, "cuda": 8192}  # that a forward holds, with padding and every row's prefix; 4096 elsewhere
WORTH_SHARING = 8  # tokens: a shorter prefix is not kept as keys and values
DEFAULT_MAX_LENGTH = 2048  # the harness's, for a model that names none


@dataclass(frozen=True)
class Option:
    """One request in words: a user turn, what is scored after it; before both a task description, and solved questions."""

    context: str
    continuation: str
    description: str = ""
    shots: tuple[tuple[str, str], ...] = ()  # (question, answer)


@dataclass(frozen=True)
class Request:
    """One request in tokens: `ids` `[length]` are context and continuation, the last `scored` of them the continuation."""

    ids: list[int]
    scored: int

    @property
    def context(self) -> list[int]:
        return self.ids[:-self.scored]


@dataclass(frozen=True)
class Encoder:
    """Options -> requests. ValueError: an option without a token to score, or with more than the model can hold."""

    tokenizer: object
    max_length: int
    apply_chat_template: bool = False
    add_bos: bool = False

    def requests(self, options: list[Option]) -> list[Request]:
        known = {}  # the options of a document mostly have the same context
        return [self.request(*self.render(option), known) for option in options]

    def render(self, option: Option) -> tuple[str, str]:
        """(context, continuation) as the model reads them. A template that refuses a system role loses the description.

        In a template a shot is a user's and an assistant's turn: the harness's command line has it so (fewshot_as_multiturn).
        """
        if not self.apply_chat_template:
            solved = "".join(f"{question} {answer}\n\n" for question, answer in option.shots)
            return option.description + solved + option.context, " " + option.continuation
        turns = [{"role": role, "content": text} for shot in option.shots
                 for role, text in zip(("user", "assistant"), shot, strict=True)]
        turns.append({"role": "user", "content": option.context})
        if option.description:
            try:
                return self.chat([{"role": "system", "content": option.description}, *turns]), option.continuation
            except Exception:  # whatever the template raises; what is wrong with all of it, the next line raises again
                pass
        return self.chat(turns), option.continuation

    def chat(self, turns: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def request(self, context: str, continuation: str, known: dict[str, list[int]]) -> Request:
        """Both are encoded as one text, which is cut where the context alone would end. Too long: the beginning goes."""
        whole = self.encode(context + continuation)
        context = context.rstrip()  # blanks at its end belong to the continuation's first token
        if context not in known:
            known[context] = self.encode(context) if context else [self.first_token()]
        before = known[context]
        rest = whole[len(before):] if context or whole[:1] == before else whole
        if not 0 < len(rest) <= self.max_length:
            raise ValueError(f"an option has {len(rest)} tokens to score; it must have 1 to {self.max_length}")
        return Request((before + rest)[-(self.max_length + 1):], len(rest))

    def encode(self, text: str) -> list[int]:
        """BOS comes once: a chat template may have written it into the text already."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.add_bos and not text.startswith(self.tokenizer.bos_token):
            return [self.tokenizer.bos_token_id, *ids]
        return ids

    def first_token(self) -> int:
        """What stands before a continuation without context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos


def max_length(model, tokenizer) -> int:
    """The context length, in tokens, that the harness takes a model to have."""
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return tokenizer.model_max_length if tokenizer.model_max_length < 1e29 else DEFAULT_MAX_LENGTH


@dataclass(frozen=True)
class Tree:
    """The inputs of some requests, what they begin with alike being there once (a token trie)."""

    tokens: list[int]  # [nodes]
    depths: list[int]  # [nodes]: the node's position in its sequence
    parents: list[int]  # [nodes]: an earlier node, or -1
    targets: list[tuple[int, int, int]]  # (node, the token it must predict, the request that asks)


def grow(requests: dict[int, Request], skip: int = 0) -> Tree:
    """The tree of the requests' inputs (all but their last token), without the first `skip` tokens, alike in all."""
    tree, children = Tree([], [], [], []), {}
    for number, request in requests.items():
        node = -1
        for depth, token in enumerate(request.ids[skip:-1], skip):
            if (node, token) not in children:
                children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.depths.append(depth)
                tree.parents.append(node)
            node = children[node, token]
            if depth + 1 >= len(request.ids) - request.scored:
                tree.targets.append((node, request.ids[depth + 1], number))
    return tree


def ancestors(tree: Tree) -> np.ndarray:
    """Who sees whom, `[nodes, nodes]`: a node sees itself and all that its parent sees."""
    sees = np.eye(len(tree.parents), dtype=bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


def separate(requests: dict[int, Request]) -> list[Tree]:
    """Trees that are plain sequences, one for each different input (the letters of an MMLU question have the same one)."""
    alike = {}
    for number, request in requests.items():
        alike.setdefault(tuple(request.ids[:-1]), {})[number] = request
    return [grow(group) for group in alike.values()]


@torch.inference_mode()
def log_likelihoods(model, documents: list[list[Request]], share: bool) -> Iterator[tuple[int, list[float]]]:
    """(index of the document, its requests' log-likelihoods in nats), the longest documents first.

    What all the documents begin with is computed once, so give those together that begin alike. `share`: see can_share.
    Out of memory: batches are half as large from there on, in later calls too. InputError: one document alone does not fit.
    """
    first = np.cumsum([0, *map(len, documents)])  # requests are numbered through
    totals = np.zeros(first[-1])
    prefix, keys = shared_prefix(model, documents) if share else ([], None)
    rows = []
    for start, document in zip(first, documents, strict=False):
        numbered = dict(enumerate(document, int(start)))
        rows.append([grow(numbered, len(prefix))] if share else separate(numbered))
    queue = sorted(range(len(rows)), key=lambda index: -longest(rows[index]))
    budget = BATCH_TOKENS.setdefault(model.device.type, 4096)
    while queue:
        batch, cost = next_batch(queue, rows, len(prefix), budget)
        if add_scores(model, [tree for index in batch for tree in rows[index]], totals, share, keys):
            del queue[:len(batch)]
            yield from ((index, totals[first[index]:first[index + 1]].tolist()) for index in batch)
        elif len(batch) > 1:
            budget = BATCH_TOKENS[model.device.type] = cost // 2
            tqdm.write(f"out of memory: going on with {budget} tokens a batch")
        else:
            raise InputError(too_large(model, cost))


def longest(document: list[Tree]) -> int:
    return max(len(tree.tokens) for tree in document)


def next_batch(queue: list[int], rows: list[list[Tree]], past: int, budget: int) -> tuple[list[int], int]:
    """(as many documents (each a list of rows) off the head of the queue as the budget holds, at least one; their tokens).

    The longest comes first and pads the others. Every row has its own copy of the prefix's `past` keys and values.
    """
    width, count, batch = past + longest(rows[queue[0]]), 0, []
    for index in queue:
        if batch and width * (count + len(rows[index])) > budget:
            break
        batch.append(index)
        count += len(rows[index])
    return batch, width * count


def too_large(model, tokens: int) -> str:
    return (f"out of memory: {model.device} cannot hold one document ({tokens} tokens) beside the model. Free memory there, "
            "show fewer examples (--num-fewshot), or take another --device")


def add_scores(model, trees: list[Tree], totals: np.ndarray, share: bool, keys: list | None) -> bool:
    """One forward: add the log-probability of every target to the total of the request that asks. Out of memory: False.

    Nothing is added then. The caller goes on after the `except`: inside, the traceback would keep all tensors alive.
    """
    numbers = [number for tree in trees for _, _, number in tree.targets]
    try:
        losses = target_losses(model, trees, tree_inputs(model, trees, keys) if share else sequence_inputs(model, trees))
    except torch.OutOfMemoryError:
        losses = None
    if losses is None:
        torch.cuda.empty_cache()
        return False
    np.subtract.at(totals, numbers, losses)
    return True


def target_losses(model, trees: list[Tree], inputs: dict) -> np.ndarray:
    """-log p `[targets]` of every target of the trees, by softmax of float32 logits."""
    width = inputs["input_ids"].shape[1]
    targets = [(row * width + node, token) for row, tree in enumerate(trees) for node, token, _ in tree.targets]
    nodes, tokens = torch.tensor(targets).T
    places, which = torch.unique(nodes, return_inverse=True)
    logits = logits_at(model, places.to(model.device), inputs)
    losses = []
    for part in torch.arange(len(targets)).split(64):  # few at a time: float32 logits are large
        some = logits[which[part].to(model.device)].float()
        losses.append(F.cross_entropy(some, tokens[part].to(model.device), reduction="none").cpu())
    return torch.cat(losses).numpy()


def logits_at(model, places: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Logits `[places, vocab]` at some places of the flattened batch; the output head sees those alone.

    By a hook on the head, so that what a model does to its logits afterwards (a cap, a scale) is still done.
    """
    def select(head, args):
        return (args[0].flatten(0, 1)[places][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if logits.shape[:2] == (1, len(places)):
        return logits[0]
    return logits.flatten(0, 1)[places]  # a model that uses its head's weight without calling it


def sequence_inputs(model, trees: list[Tree]) -> dict:
    """Trees that are sequences, padded on the right, where a causal model does not look."""
    return {"input_ids": pad([tree.tokens for tree in trees], model.device), "use_cache": False}


def tree_inputs(model, trees: list[Tree], keys: list | None) -> dict:
    """A batch of trees, each behind a prefix of which `keys` are the keys and values (None: no prefix)."""
    past = keys[0][0].shape[2] if keys else 0
    width = max(len(tree.tokens) for tree in trees)
    sees = np.zeros((len(trees), 1, width, past + width), dtype=bool)
    sees[..., :past] = True
    for row, tree in enumerate(trees):
        end = len(tree.tokens)
        sees[row, 0, :end, past:past + end] = ancestors(tree)
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill_(~torch.from_numpy(sees), torch.finfo(model.dtype).min)
    cache = DynamicCache([[states.expand(len(trees), -1, -1, -1) for states in layer] for layer in keys]) if keys else None
    return {"input_ids": pad([tree.tokens for tree in trees], model.device), "attention_mask": mask.to(model.device),
            "position_ids": pad([tree.depths for tree in trees], model.device),
            "past_key_values": cache, "use_cache": bool(keys)}


def pad(rows: list[list[int]], device) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def shared_prefix(model, documents: list[list[Request]]) -> tuple[list[int], list | None]:
    """(tokens with which every context begins, less the last; their (keys, values) `[1, heads, length, width]` by layer)."""
    prefix = os.path.commonprefix([request.context[:-1] for document in documents for request in document])
    if len(prefix) < WORTH_SHARING:
        return [], None
    cache = DynamicCache()
    last = torch.tensor([len(prefix) - 1], device=model.device)  # some logits have to be asked for
    try:
        logits_at(model, last, {"input_ids": pad([prefix], model.device), "past_key_values": cache, "use_cache": True})
    except torch.OutOfMemoryError:
        raise InputError(too_large(model, len(prefix))) from None
    return prefix, [(layer.keys, layer.values) for layer in cache.layers]


def trial(model, share: bool) -> list[float]:
    """Log-likelihoods of a made-up document of random tokens: tells one model from another, and whether trees work on it."""
    ids = np.random.default_rng(0).integers(0, model.get_input_embeddings().num_embeddings, size=200).tolist()
    requests = [Request(ids[:18] + ids[20 * i:20 * i + 1 + 2 * i], 1 + 2 * i) for i in range(1, 7)]
    return next(log_likelihoods(model, [requests], share))[1]


def can_share(model) -> bool:
    """Do trees behind a prefix score as separate sequences do? Plain keys and values everywhere, and the same result."""
    try:
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        tolerance = 1e-5 if model.dtype == torch.float32 else 0.02
        return plain and np.allclose(trial(model, True), trial(model, False), rtol=tolerance)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False
