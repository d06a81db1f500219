"""log p(continuation | context) as lm-evaluation-harness 0.4.13 computes it, for many documents at once.

Covered: any Hugging Face causal model, the chat template, BOS, contexts that end in blanks, the harness's
truncation. Not covered: encoder-decoder models, rolling log-likelihoods.

Why it is fast. The options of a document share their context. So their inputs form a tree, and no token of a
tree is computed twice. A tree is one row of a batch. Its nodes stand one after the other, each at the
position of its depth, and each attends to its own ancestors and to nothing else. What all documents of a
group begin with (an MMLU subject's header and shots, TruthfulQA's six examples) is computed once and kept as
keys and values. Trees are batched by size. The output head runs only where a token of a continuation is
predicted.

Some models cannot be used like this (sliding windows, state spaces, ALiBi). A short trial finds them out, and
every one of their options becomes a row of its own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from support.cli import InputError

# Tokens that a forward pass holds, with padding and every row's copy of the prefix. Other devices: 4096.
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
WORTH_SHARING = 8  # tokens: a shorter prefix is not kept as keys and values
DEFAULT_MAX_LENGTH = 2048  # the harness's, for a model that names none


# --------------------------------------------------------------------------------------- options to token ids


@dataclass(frozen=True)
class Option:
    """One request in words: a user turn, what is scored after it, and what may stand before it."""

    context: str
    continuation: str
    description: str = ""  # of the task, before everything else
    shots: tuple[tuple[str, str], ...] = ()  # solved questions: (question, answer)


@dataclass(frozen=True)
class Request:
    """One request in tokens."""

    ids: list[int]  # [length]: context and continuation
    scored: int  # so many of the last tokens are the continuation

    @property
    def context(self) -> list[int]:
        return self.ids[:-self.scored]


@dataclass(frozen=True)
class Encoder:
    """Options -> requests. ValueError: an option has no token to score, or more than the model can hold."""

    tokenizer: object
    max_length: int
    apply_chat_template: bool = False
    add_bos: bool = False

    def requests(self, options: list[Option]) -> list[Request]:
        known_contexts = {}  # the options of a document mostly have the same context
        requests = []
        for option in options:
            context, continuation = self.render(option)
            requests.append(self.request(context, continuation, known_contexts))
        return requests

    def render(self, option: Option) -> tuple[str, str]:
        """(context, continuation) as the model reads them.

        A template that refuses a system role loses the description. In a template a shot is a user's and an
        assistant's turn, as it is with the harness's fewshot_as_multiturn.
        """
        if not self.apply_chat_template:
            solved = "".join(f"{question} {answer}\n\n" for question, answer in option.shots)
            return option.description + solved + option.context, " " + option.continuation

        turns = []
        for question, answer in option.shots:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        turns.append({"role": "user", "content": option.context})

        if option.description:
            system = {"role": "system", "content": option.description}
            try:
                return self.chat([system, *turns]), option.continuation
            except Exception:  # whatever it raises; a template wrong without it too raises again below
                pass
        return self.chat(turns), option.continuation

    def chat(self, turns: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def request(self, context: str, continuation: str, known_contexts: dict[str, list[int]]) -> Request:
        """Both are encoded as one text, which is cut where the context alone would end.

        Where that is longer than the model's context, its beginning goes.
        """
        whole = self.encode(context + continuation)
        context = context.rstrip()  # blanks at its end belong to the continuation's first token
        if context not in known_contexts:
            known_contexts[context] = self.encode(context) if context else [self.first_token()]
        before = known_contexts[context]

        whole_begins_with_it = bool(context) or whole[:1] == before
        rest = whole[len(before):] if whole_begins_with_it else whole
        scored = len(rest)
        if not 0 < scored <= self.max_length:
            raise ValueError(f"an option has {scored} tokens to score; it must have 1 to {self.max_length}")
        longest = self.max_length + 1  # the last token is predicted, and not read
        return Request((before + rest)[-longest:], scored)

    def encode(self, text: str) -> list[int]:
        """BOS comes once, because a chat template may have written it into the text already."""
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
        length = getattr(config, name, None)
        if length is not None:
            return int(length)
    return tokenizer.model_max_length if tokenizer.model_max_length < 1e29 else DEFAULT_MAX_LENGTH


# ------------------------------------------------------------------------------------------ requests to trees


class Target(NamedTuple):
    """A token of a continuation that is to be scored."""

    node: int  # whose output predicts it
    token: int
    request: int  # to whose log-likelihood it counts


@dataclass(frozen=True)
class Tree:
    """The inputs of some requests. What two of them begin with alike is there once (a token trie)."""

    tokens: list[int] = field(default_factory=list)  # [nodes]
    depths: list[int] = field(default_factory=list)  # [nodes]: the node's position in its sequence
    parents: list[int] = field(default_factory=list)  # [nodes]: an earlier node, or -1
    targets: list[Target] = field(default_factory=list)


def build_tree(requests: dict[int, Request], skip: int = 0) -> Tree:
    """The tree of the requests' inputs, without the first `skip` tokens, in which all are alike.

    A request's input is all its tokens except the last, which is only predicted.
    """
    tree = Tree()
    children = {}  # (node, token) -> the node of that token below it
    for number, request in requests.items():
        node = -1
        first_target = len(request.ids) - request.scored
        for depth in range(skip, len(request.ids) - 1):
            token, next_token = request.ids[depth], request.ids[depth + 1]
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.depths.append(depth)
                tree.parents.append(node)
            node = child
            if depth + 1 >= first_target:
                tree.targets.append(Target(node, next_token, number))
    return tree


def build_sequences(requests: dict[int, Request]) -> list[Tree]:
    """Trees that do not branch, one for every different input (the letters of an MMLU question share one)."""
    same_input = {}
    for number, request in requests.items():
        group = same_input.setdefault(tuple(request.ids[:-1]), {})
        group[number] = request
    return [build_tree(group) for group in same_input.values()]


def visible_nodes(tree: Tree) -> np.ndarray:
    """Who attends to whom, `[nodes, nodes]`: a node to itself, and to all that its parent attends to."""
    visible = np.eye(len(tree.parents), dtype=bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


# -------------------------------------------------------------------------------------------- trees to scores


@torch.inference_mode()
def log_likelihoods(model, documents: list[list[Request]], share: bool) -> Iterator[tuple[int, list[float]]]:
    """(index of the document, its requests' log-likelihoods in nats), the longest documents first.

    What all the documents begin with is computed once, so give those together that begin alike. `share`: see
    can_share. Out of memory: batches are half as large from there on, in later calls too. InputError: one
    document does not fit.
    """
    # 1. Number the requests of all documents, and compute what all their contexts begin with.
    first_request = np.cumsum([0, *map(len, documents)])
    totals = np.zeros(first_request[-1])
    prefix, prefix_states = shared_prefix(model, documents) if share else ([], None)

    # 2. Turn every document into rows of a batch: one tree, or a sequence for every different input.
    rows = []
    for first, document in zip(first_request, documents, strict=False):
        requests = dict(enumerate(document, int(first)))
        if share:
            rows.append([build_tree(requests, skip=len(prefix))])
        else:
            rows.append(build_sequences(requests))

    # 3. Score batch after batch. The longest documents come first, so that a batch is alike in length.
    queue = sorted(range(len(rows)), key=lambda index: -longest_row(rows[index]))
    budget = BATCH_TOKENS.setdefault(model.device.type, 4096)
    while queue:
        batch, tokens = next_batch(queue, rows, len(prefix), budget)
        trees = []
        for index in batch:
            trees += rows[index]

        if add_scores(model, trees, totals, share, prefix_states):
            del queue[:len(batch)]
            for index in batch:
                yield index, totals[first_request[index]:first_request[index + 1]].tolist()
        elif len(batch) > 1:
            budget = BATCH_TOKENS[model.device.type] = tokens // 2
            tqdm.write(f"out of memory: going on with {budget} tokens a batch")
        else:
            raise InputError(too_large(model, tokens))


def shared_prefix(model, documents: list[list[Request]]) -> tuple[list[int], list | None]:
    """(the tokens with which every context begins, their (keys, values) of every layer).

    Keys and values are `[1, heads, length, width]`. A context's last token is never among them: it predicts a
    target, so that it has to be computed with its document.
    """
    contexts = [request.context[:-1] for document in documents for request in document]
    prefix = os.path.commonprefix(contexts)  # works on any lists, not only on paths
    if len(prefix) < WORTH_SHARING:
        return [], None

    cache = DynamicCache()
    inputs = {"input_ids": pad([prefix], model.device), "past_key_values": cache, "use_cache": True}
    some_place = torch.tensor([len(prefix) - 1], device=model.device)  # the logits are not used
    try:
        logits_at(model, some_place, inputs)
    except torch.OutOfMemoryError:
        raise InputError(too_large(model, len(prefix))) from None
    return prefix, [(layer.keys, layer.values) for layer in cache.layers]


def longest_row(document: list[Tree]) -> int:
    return max(len(tree.tokens) for tree in document)


def next_batch(queue: list[int], rows: list[list[Tree]], prefix: int, budget: int) -> tuple[list[int], int]:
    """(documents off the head of the queue, as many as the budget holds, their tokens with padding).

    At least one is taken, even where it is larger than the budget. The first document is the longest, and the
    others are padded to it. Every row has its own copy of the prefix.
    """
    width = prefix + longest_row(rows[queue[0]])
    batch, count = [], 0
    for index in queue:
        if batch and width * (count + len(rows[index])) > budget:
            break
        batch.append(index)
        count += len(rows[index])
    return batch, width * count


def too_large(model, tokens: int) -> str:
    return (f"out of memory: {model.device} cannot hold one document ({tokens} tokens) beside the model. "
            "Free memory there, show fewer examples (--num-fewshot), or take another --device")


def add_scores(model, trees: list[Tree], totals: np.ndarray, share: bool, prefix_states: list | None) -> bool:
    """One forward pass: add every target's log-probability to the total of its request. Out of memory: False.

    Nothing is added then. The caller goes on after the `except`: inside, the traceback would keep all tensors
    alive.
    """
    try:
        losses = target_losses(model, trees, batch_inputs(model, trees, share, prefix_states))
    except torch.OutOfMemoryError:
        losses = None
    if losses is None:
        torch.cuda.empty_cache()
        return False

    requests = [target.request for tree in trees for target in tree.targets]
    np.subtract.at(totals, requests, losses)
    return True


def target_losses(model, trees: list[Tree], inputs: dict) -> np.ndarray:
    """-log p `[targets]` of every target of the trees, by softmax of float32 logits."""
    # 1. Where in the batch the targets are predicted. Options that part after a node share its logits.
    width = inputs["input_ids"].shape[1]
    places, tokens = [], []
    for row, tree in enumerate(trees):
        for target in tree.targets:
            places.append(row * width + target.node)
            tokens.append(target.token)
    different_places, which_place = torch.unique(torch.tensor(places), return_inverse=True)

    # 2. The logits of these places, and the loss of a few targets at a time: float32 logits are large.
    logits = logits_at(model, different_places.to(model.device), inputs)
    losses = []
    for some_places, some_tokens in zip(which_place.split(64), torch.tensor(tokens).split(64), strict=True):
        some_logits = logits[some_places.to(model.device)].float()
        loss = F.cross_entropy(some_logits, some_tokens.to(model.device), reduction="none")
        losses.append(loss.cpu())
    return torch.cat(losses).numpy()


def logits_at(model, places: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Logits `[places, vocab]` at some places of the flattened batch. The output head sees these alone.

    They are selected by a hook on the head, so that what a model does to its logits afterwards (a cap, a
    scale) is done.
    """
    def select(head, args):
        hidden = args[0].flatten(0, 1)
        return (hidden[places][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if logits.shape[:2] == (1, len(places)):
        return logits[0]
    return logits.flatten(0, 1)[places]  # a model that uses its head's weight without calling it


def batch_inputs(model, trees: list[Tree], share: bool, prefix_states: list | None) -> dict:
    """The model's inputs for a batch, a row a tree. `prefix_states` is None where they have no prefix."""
    ids = pad([tree.tokens for tree in trees], model.device)
    if not share:  # sequences, padded on the right, where a causal model does not look
        return {"input_ids": ids, "use_cache": False}

    positions = pad([tree.depths for tree in trees], model.device)
    mask = tree_mask(model, trees, prefix_states[0][0].shape[2] if prefix_states else 0)
    cache = None
    if prefix_states:
        layers = []
        for keys, values in prefix_states:
            layers.append([keys.expand(len(trees), -1, -1, -1), values.expand(len(trees), -1, -1, -1)])
        cache = DynamicCache(layers)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache,
            "use_cache": cache is not None}


def tree_mask(model, trees: list[Tree], prefix: int) -> torch.Tensor:
    """What is added to attention's scores, `[trees, 1, width, prefix + width]`: 0 where a node may look."""
    width = longest_row(trees)
    visible = np.zeros((len(trees), 1, width, prefix + width), dtype=bool)
    visible[..., :prefix] = True
    for row, tree in enumerate(trees):
        end = len(tree.tokens)
        visible[row, 0, :end, prefix:prefix + end] = visible_nodes(tree)

    forbidden = ~torch.from_numpy(visible)
    mask = torch.zeros(visible.shape, dtype=model.dtype)
    return mask.masked_fill_(forbidden, torch.finfo(model.dtype).min).to(model.device)


def pad(rows: list[list[int]], device) -> torch.Tensor:
    """Rows of different lengths as one tensor `[rows, longest]`, filled up with zeros on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


# ------------------------------------------------------------------------------------- which models can share


def can_share(model) -> bool:
    """Do trees behind a prefix score as separate sequences do?

    The model must keep plain keys and values in every layer, and must score a made-up document alike in both
    ways.
    """
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.02
    try:
        cache = DynamicCache(config=model.config)
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        return plain and np.allclose(trial(model, share=True), trial(model, share=False), rtol=tolerance)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False


def trial(model, share: bool) -> list[float]:
    """Log-likelihoods of a made-up document of random tokens.

    They tell one model from another, and whether trees work on it.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = np.random.default_rng(0).integers(0, vocabulary, size=200).tolist()
    context = ids[:18]
    requests = []
    for i in range(1, 7):  # continuations of 3, 5, ... 13 tokens
        scored = 1 + 2 * i
        requests.append(Request(context + ids[20 * i : 20 * i + scored], scored))
    _, scores = next(log_likelihoods(model, [requests], share))
    return scores
