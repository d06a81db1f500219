"""What a model allows is tried on the model itself, once and in seconds: no name is believed.

Each fast way rests on a property. Rows that are packed must equal rows alone, a shared prefix must equal
none, hidden states times the head's weight must equal the logits, and our attention must equal the model's
own. Each is compared with the model's plain forward over one row of random tokens. Where one fails, the slow
way is taken. It is right for every model, and one line says so. One step of LoRA training is tried as well.

How far logits may be off is measured too: by what the last bit of the embeddings changes. In 16 bits that
can be a tenth of their spread. So whether rows see each other, or their prefix, is asked of the gradient as
well. It is exactly zero where nothing is seen.

One thing is read off the configuration, because no short row shows it: lengths at which something may change.
These are whole numbers under a key with "position", "ctx" (the context, a change of rotary frequencies),
"window", "chunk" or "topk" (attention to some tokens only). Up to `REACH`, one row of the trial is well
beyond them. No pack is longer than the next such number (`Ways.pack_limit`), so that rows beyond it go alone.

What escapes: a length under another name, a kernel that a machine chooses by length, a batch that changes its
rows, gradient checkpointing, and in 16 bits a difference that is smaller than rounding.
"""

import contextlib
import weakref

import torch
from tqdm import tqdm

import lora
from engine.forward import Row, Ways, common_prefix, logits_at, pack, plain_inputs, target_logits
from engine.lora_trial import CAN_GO_WRONG, failure, try_training_step
from support.cli import InputError

LENGTHS = (9, 9, 5, 14)  # of the rows that are tried; the first two are alike, to run as a batch
PREFIX = 6  # tokens of the prefix that is tried
REACH = {"cpu": 160, "cuda": 2100}  # a window of up to so many tokens gets a row that is well beyond it

_ways = weakref.WeakKeyDictionary()  # model -> (its attention, its Ways)
_right_with_rows = weakref.WeakSet()  # models whose logits are their own under "rows"


def check(model, *, bf16: bool = False) -> list[str]:
    """Try all that a run rests on, before any generation -> lines on what is slower, or not trained.

    `bf16`: the training to come computes matrix products in bfloat16. InputError: the model cannot run, or
    the LoRA layers that are in it cannot be trained.
    """
    ways = ways_of(model, announce=False)
    lines = list(ways.slow)
    if lora.parameters(model):
        short = trial_rows(model)[: len(LENGTHS)]
        lines += try_training_step(model, short[:3], with_prefix(model, short), ways, bf16)
    return lines


def ways_of(model, announce: bool = True) -> Ways:
    """The fast ways that this model allows, tried at the first call. LoRA layers may come and go.

    `announce` prints a line for each way that fails. InputError: the model cannot run, or is not causal.
    """
    attention, ways = _ways.get(model, (None, None))
    if attention != model.config._attn_implementation:
        ways = try_ways(model)
        _ways[model] = model.config._attn_implementation, ways
        if announce:
            for line in ways.slow:
                tqdm.write(line)
    return ways


def use_rows_attention(model) -> None:
    """Switch from "sdpa" to our attention, "rows", where that gives the model's own logits. Else say so."""
    if model.config._attn_implementation != "sdpa":
        return
    try:
        model.set_attn_implementation("rows")
    except CAN_GO_WRONG:
        return
    with as_base_model(model):
        line = back_to_own_attention(model, rows_that_fit(model))
    if line:
        tqdm.write(line)


@contextlib.contextmanager
def as_base_model(model):
    """In evaluation mode, without LoRA, and in the model's own precision."""
    training = model.training
    model.eval()
    try:
        precision = torch.autocast(model.device.type, enabled=False)
        with lora.disabled(model), torch.inference_mode(False), torch.no_grad(), precision:
            yield
    finally:
        model.train(training)


def try_ways(model) -> Ways:
    """Try every property in turn, the later ones on what the earlier ones allow."""
    ways = Ways()
    with as_base_model(model):
        # 1. Our attention, if it is in: every input of a "rows" model goes through it.
        rows = rows_that_fit(model)
        line = back_to_own_attention(model, rows)
        if line:
            ways.slow.append(line)

        # 2. The reference, and how far the model's own rounding reaches.
        expected = [plain_logits(model, ids) for ids, _ in rows]
        tolerance = allowed_deviation(model, rows, expected)
        if tried(looks_ahead, model, rows):
            name = type(model).__name__
            raise InputError(f"{name} is no causal language model: what it predicts depends on later tokens")

        # 3. Logits at some positions only.
        ways.keeps_logits = bool(tried(keeps_logits, model, rows, expected, tolerance))

        # 4. The fast ways.
        try_packs(model, rows, expected, tolerance, ways)
        fault = "its logits are more than a product with the head's weight"
        instead = "the loss keeps them all"
        ways.plain_head = allowed(model, ways, fault, instead, has_plain_head, model, rows[0])
    return ways


def try_packs(model, rows, expected, tolerance, ways) -> None:
    """Try rows that are packed, then a prefix that they share."""
    longest = max(len(ids) for ids, _ in rows)
    beyond = [length for length in lengths_in(model.config) if length >= longest]
    ways.pack_limit = min(beyond, default=ways.pack_limit)

    fault = "packed rows would change each other"
    instead = "each row has a forward pass of its own"
    ways.packed = allowed(model, ways, fault, instead, packs, model, rows, expected, tolerance, ways)
    if ways.packed:
        fault = "rows cannot share a prefix"
        instead = "each row reads it again"
        ways.shared_prefix = allowed(model, ways, fault, instead, shares_prefix, model, rows, tolerance, ways)


def allowed(model, ways, fault: str, instead: str, property_holds, *args) -> bool:
    """Whether a property holds. Where it does not, a line on its fault, and what is done instead, is kept."""
    holds = tried(property_holds, *args)
    if holds:
        return True
    if holds is None:
        fault = f"memory ran out in a trial, and perhaps {fault}"
    ways.slow.append(f"{type(model).__name__}: {fault}, so {instead}")
    return False


def tried(function, *args):
    """What a function returns. False: it fails. None: memory runs out, so nothing is known."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        return None
    except CAN_GO_WRONG:
        return False


# ----------------------------------------------------------------------------------- the rows that are tried


def rows_that_fit(model) -> list[Row]:
    """The rows of a trial, without the one beyond windows where memory does not hold it.

    Packs then stay shorter than these windows.
    """
    rows = trial_rows(model)
    longest, _ = rows[-1]
    if len(rows) > len(LENGTHS) and tried(logits_of, model, longest) is None:
        rows.pop()
    return rows


def trial_rows(model) -> list[Row]:
    """Rows of random tokens, of which all except the first are targets.

    Special tokens stand at the ends of most vocabularies, so these come from its middle. The last row is
    longer than any window that is short enough for a trial. No row is longer than the model's context.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    context = min(context_lengths(model.config), default=2**31)
    reach = REACH.get(model.device.type, REACH["cpu"])
    windows = [n for n in lengths_in(model.config) if n <= reach and n < context]
    lengths = [min(length, context) for length in LENGTHS]
    if windows:
        longest = max(windows)
        well_beyond = longest + min(longest, 512) + 8  # at first a choice of tokens may be right by chance
        lengths.append(min(well_beyond, context))

    generator = torch.Generator().manual_seed(0)
    first, end = vocabulary // 4, vocabulary - vocabulary // 4
    rows = []
    for length in lengths:
        ids = torch.randint(first, end, (length,), generator=generator).tolist()
        is_target = [False] + [True] * (length - 1)
        rows.append((ids, is_target))
    return rows


def lengths_in(config) -> list[int]:
    """All numbers of tokens in the configuration at which, by their names, something may change."""
    settings = config.get_text_config(decoder=True).to_dict()
    return numbers(settings, ("position", "ctx", "window", "chunk", "topk"))


def context_lengths(config) -> list[int]:
    """Those that name the most positions a model takes, or takes with one set of rotary frequencies."""
    return numbers(config.get_text_config(decoder=True).to_dict(), ("position", "ctx"))


def numbers(settings, words) -> list[int]:
    """The whole numbers above 1 in nested settings whose key has one of the words, and counts no layers."""
    found = []
    for key, value in settings.items():
        named = any(word in str(key) for word in words) and "layer" not in str(key)
        if isinstance(value, dict):
            found += numbers(value, words)
        elif named and type(value) is int and value > 1:
            found.append(value)
    return found


def with_prefix(model, rows) -> list[Row]:
    """All rows except the first, behind a prefix that they share."""
    context = min(context_lengths(model.config), default=2**31)
    prefix = rows[0][0][: min(PREFIX, context // 2)]
    prefixed = []
    for ids, _ in rows[1:]:
        whole = (prefix + ids)[:context]
        targets = len(whole) - len(prefix) - 1
        prefixed.append((whole, [False] * (len(prefix) + 1) + [True] * targets))
    return prefixed


# ------------------------------------------------------------------------------------------ the comparisons


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """Logits `[length, vocab]` of one row. InputError: the model fails, or memory runs out."""
    try:
        return logits_of(model, ids)
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory over one row of {len(ids)} tokens: take a smaller model") from None
    except CAN_GO_WRONG as error:
        raise failure(model, f"a forward pass over {len(ids)} tokens", error) from None


def logits_of(model, ids: list[int]) -> torch.Tensor:
    """Logits `[length, vocab]` of one row, as anyone would call the model."""
    return model(**plain_inputs(model, torch.tensor(ids, device=model.device))).logits[0]


def deviation(found, expected) -> float:
    """How far logits `[tokens, vocab]` are from the expected ones, at the worst token.

    It is the root of the mean square over the vocabulary, in units of the expected logits' spread. In
    SmolLM2-135M in bfloat16 the worst entry of the vocabulary is off by up to 0.6 from one attention kernel
    to another, and the root mean square by up to 0.2.
    """
    worst = []
    for start in range(0, len(expected), 256):  # in float32 all of them at once would be large
        part = slice(start, start + 256)
        wanted = expected[part].float()
        difference = (found[part].float() - wanted).square().mean(-1).sqrt()
        worst.append((difference / wanted.std(-1)).max())
    return torch.stack(worst).max().item()


def allowed_deviation(model, rows, expected) -> float:
    """What counts as equal: twice what the last bit of the embeddings changes, between bounds.

    The same sums in another order differ by rounding. How far that reaches depends on the model. In 16 bits
    it may even change the choice of an expert. What is really wrong is off by half a spread or more at some
    token.
    """
    generator = torch.Generator().manual_seed(0)

    def change_last_bit(module, args, output):
        sign = torch.randint(2, output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.float() * (1 + sign * torch.finfo(output.dtype).eps)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(change_last_bit)
    try:
        changed = [plain_logits(model, ids) for ids, _ in rows]
    finally:
        handle.remove()
    rounding = max(deviation(*pair) for pair in zip(changed, expected, strict=True))
    most = 1e-3 if model.dtype == torch.float32 else 0.5
    return min(max(least_deviation(model), 2 * rounding), most)


def least_deviation(model) -> float:
    """What counts as equal at least, in the smallest of models."""
    return 1e-4 if model.dtype == torch.float32 else 0.05


def keeps_logits(model, rows, expected, tolerance) -> bool:
    """Does the model hand out its logits at some positions only?"""
    ids, _ = rows[0]
    positions = torch.tensor([1, 4, 5], device=model.device)
    inputs = plain_inputs(model, torch.tensor(ids, device=model.device))
    found = logits_at(model, inputs, positions, keeps_logits=True)
    wanted = expected[0][positions]
    return found.shape == wanted.shape and deviation(found, wanted) <= tolerance


def packs(model, rows, expected, tolerance, ways) -> bool:
    """Do packed rows equal rows alone, and is the last of a pack independent of all before it?

    A state that fades, such as Mamba's, may change logits by less than 16 bits resolve. A gradient shows it.
    """
    whole_pack = Ways(packed=True, keeps_logits=ways.keeps_logits)
    found, _ = target_logits(model, rows, False, whole_pack)
    alone = torch.cat([logits[:-1] for logits in expected])  # all tokens except a row's first are targets
    if not deviation(found, alone) <= tolerance:  # nor where it is not a number
        return False

    short, long = rows[2], rows[3]
    inputs, _, _ = pack(model, [short, long, short])
    tokens = inputs["input_ids"].shape[1]
    before_last = tokens - len(short[0])
    seen = seen_by(model, inputs, slice(before_last, tokens))
    return not seen[:before_last].any()


def looks_ahead(model, rows) -> bool:
    """Does an output depend on later tokens?"""
    ids, _ = rows[0]
    inputs = plain_inputs(model, torch.tensor(ids, device=model.device))
    middle = len(ids) // 2
    return bool(seen_by(model, inputs, slice(0, middle))[middle:].any())


def seen_by(model, inputs: dict, outputs: slice) -> torch.Tensor:
    """At which tokens `[tokens]` the logits at some positions have any gradient, however small.

    ValueError: no gradient comes anywhere, so that nothing is shown.
    """
    embedded = []

    def start_here(module, args, output):
        leaf = output.detach().requires_grad_()
        embedded.append(leaf)
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits[0, outputs].float()
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
            weighted = (logits * weights.to(logits.device)).sum()
            gradient = torch.autograd.grad(weighted, embedded[0])[0][0]  # [tokens, hidden]
    finally:
        handle.remove()
    if not gradient[outputs].any():
        raise ValueError("no gradient comes to the embeddings")
    return gradient.any(dim=-1)


def shares_prefix(model, rows, tolerance, ways) -> bool:
    """Do rows behind a prefix that is read once equal whole rows alone? Does the last see it alone?"""
    if model.config._attn_implementation != "rows":
        return False  # a row sees a prefix outside itself in our attention alone
    prefixed = with_prefix(model, rows)
    in_one_pack = Ways(packed=True, shared_prefix=True, keeps_logits=ways.keeps_logits)
    found, _ = target_logits(model, prefixed, True, in_one_pack)
    alone, _ = target_logits(model, prefixed, False, Ways())
    if not deviation(found, alone) <= tolerance:
        return False

    short = prefixed[:3]
    shared = common_prefix(short)
    inputs, _, _ = pack(model, short, shared)
    tokens = inputs["input_ids"].shape[1]
    before_last = tokens - (len(short[-1][0]) - shared)
    seen = seen_by(model, inputs, slice(before_last, tokens))
    return bool(seen[:shared].any() and not seen[shared:before_last].any())


def has_plain_head(model, row) -> bool:
    """Are the logits hidden @ weight.T, and nothing else, however large the hidden states are?

    A cap does not show on small logits. So the hidden states are tried 256 times as large as well.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or model.base_model is model:
        return False
    ids, _ = row
    for factor in (1, 256):
        hidden, logits = enlarged(model, ids, factor)
        product = hidden.to(head.weight.dtype) @ head.weight.T
        if not deviation(product, logits) <= least_deviation(model):
            return False
    return True


def enlarged(model, ids: list[int], factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states `[length, hidden]` of one row, times a factor, and the logits that they give."""
    hidden = []

    def enlarge(module, args, output):
        output.last_hidden_state = output.last_hidden_state * factor
        hidden.append(output.last_hidden_state[0])
        return output

    handle = model.base_model.register_forward_hook(enlarge)
    try:
        logits = logits_of(model, ids)
    finally:
        handle.remove()
    return hidden[0], logits


def back_to_own_attention(model, rows) -> str | None:
    """Put the model's own attention back where "rows" does not give its logits -> a line that says so."""
    if model.config._attn_implementation != "rows" or model in _right_with_rows:
        return None
    ours = [tried(logits_of, model, ids) for ids, _ in rows]
    own = set_own_attention(model)
    try:
        expected = [plain_logits(model, ids) for ids, _ in rows]
    except InputError:
        model.set_attn_implementation("rows")
        raise
    tolerance = allowed_deviation(model, rows, expected)
    name = type(model).__name__
    for found, wanted in zip(ours, expected, strict=True):
        if found is None:
            return f"{name}: memory ran out in a trial of our attention, so it keeps its own ({own})"
        if found is False or not deviation(found, wanted) <= tolerance:
            return f"{name}: our attention computes something else, so it keeps its own ({own})"
    model.set_attn_implementation("rows")
    _right_with_rows.add(model)
    return None


def set_own_attention(model) -> str:
    """Put "sdpa" in the place of "rows", or "eager" where the model knows no other -> its name."""
    try:
        model.set_attn_implementation("sdpa")
    except CAN_GO_WRONG:
        model.set_attn_implementation("eager")
    return model.config._attn_implementation
