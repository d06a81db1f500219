"""What a model allows is tried on the model itself, once and in seconds: no name or setting is believed.

Each fast way rests on a property. Rows that are packed must equal rows alone, a shared prefix must equal
none, hidden states times the head's weight must equal the logits, and our attention must equal the model's
own. Each is compared with the model's plain forward over one row of random tokens. Where one fails, the slow
way is taken. It is right for every model, and one line says so. One step of LoRA training is tried as well.

Covered: what a few rows of up to `REACH` tokens can show. Longer inputs may meet a window, a chunk or a
change of rotary frequencies. Packs stay shorter than any such number in the configuration
(`Ways.pack_limit`), so that rows beyond it go alone. Not covered: a kernel that a machine chooses by length,
and a batch that changes its rows.
"""

import contextlib
import weakref

import torch
from tqdm import tqdm

import lora
from engine.forward import Row, Ways, logits_at, pack, plain_inputs, target_logits
from engine.lora_trial import CAN_GO_WRONG, failure, try_training_step
from support.cli import InputError

LENGTHS = (9, 9, 5, 14)  # of the rows that are tried; the first two are alike, to run as a batch
PREFIX = 6  # tokens of the prefix that is tried
REACH = {"cpu": 160, "cuda": 2100}  # a window of up to so many tokens gets a row that is well beyond it

_ways = weakref.WeakKeyDictionary()  # model -> (its attention, its Ways)
_right_with_rows = weakref.WeakSet()  # models whose logits are their own under "rows"


def check(model, tokenizer) -> list[str]:
    """Try all that a run rests on, before any generation -> lines on what is slower, or not trained.

    InputError: the model cannot run, or the LoRA layers that are in it cannot be trained.
    """
    ways = ways_of(model, announce=False)
    lines = list(ways.slow)
    if lora.parameters(model):
        lines += try_training_step(model, trial_rows(model)[:3], ways)
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
        line = back_to_own_attention(model, trial_rows(model))
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
    name = type(model).__name__
    rows = trial_rows(model)

    def fails(line):
        ways.slow.append(f"{name}: {line}")

    with as_base_model(model):
        # 1. Our attention, if it is in: every input of a "rows" model goes through it.
        line = back_to_own_attention(model, rows)
        if line:
            ways.slow.append(line)

        # 2. The reference, and how far the model's own rounding reaches.
        expected = [plain_logits(model, ids) for ids, _ in rows]
        tolerance = allowed_deviation(model, rows, expected)
        if tried(looks_ahead, model, rows):
            raise InputError(f"{name} is no causal language model: what it predicts depends on later tokens")

        # 3. Logits at some positions only.
        ways.keeps_logits = tried(keeps_logits, model, rows, expected, tolerance)

        # 4. Rows that are packed.
        longest = max(len(ids) for ids, _ in rows)
        ways.pack_limit = min([n for n in lengths_in(model.config) if n >= longest], default=ways.pack_limit)
        ways.packed = tried(packs, model, rows, expected, tolerance, ways)
        if not ways.packed:
            fails("packed rows would change each other, so each row has a forward pass of its own")

        # 5. A prefix that is read once.
        ways.shared_prefix = ways.packed and tried(shares_prefix, model, rows, tolerance, ways)
        if ways.packed and not ways.shared_prefix:
            fails("rows cannot share a prefix, so each row reads it again")

        # 6. The head.
        ways.plain_head = tried(has_plain_head, model, rows[0], expected[0], tolerance)
        if not ways.plain_head:
            fails("its logits are more than a product with the head's weight, so the loss keeps them all")
    return ways


def tried(property_holds, *args) -> bool:
    """Whether a property holds. An error is a no, out of memory too: the slow ways need less of it."""
    try:
        return property_holds(*args)
    except CAN_GO_WRONG:
        return False


# ----------------------------------------------------------------------------------- the rows that are tried


def trial_rows(model) -> list[Row]:
    """Rows of random tokens, all but the first of each a target.

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
        well_beyond = (
            longest + min(longest, 512) + 8
        )  # a choice of some tokens may be right by chance at first
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


# ------------------------------------------------------------------------------------------ the comparisons


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """Logits `[length, vocab]` of one row, as anyone would call the model. InputError: it fails."""
    try:
        return model(**plain_inputs(model, torch.tensor(ids, device=model.device))).logits[0]
    except torch.OutOfMemoryError:
        raise InputError(f"out of memory over one row of {len(ids)} tokens: take a smaller model") from None
    except CAN_GO_WRONG as error:
        raise failure(model, f"a forward pass over {len(ids)} tokens", error) from None


def deviation(found, expected) -> float:
    """How far logits `[tokens, vocab]` are from the expected ones, in their spread, at the worst token."""
    parts = []
    for start in range(0, len(expected), 256):  # in float32 all of them at once would be large
        part = slice(start, start + 256)
        wanted = expected[part].float()
        difference = (found[part].float() - wanted).abs().amax(-1)
        parts.append(difference / wanted.std(-1))
    return torch.cat(parts).max().item()


def allowed_deviation(model, rows, expected) -> float:
    """What counts as equal: three times what the shape of a batch alone changes, between bounds.

    Rows of one length may run as a batch in any model. In 16 bits that changes the rounding, and with
    mixtures of experts now and then a choice. What is really wrong is off by a spread or more, where it is
    off at all.
    """
    least, most = (1e-4, 1e-3) if model.dtype == torch.float32 else (0.05, 0.3)
    batch = torch.tensor([ids for ids, _ in rows[:2]], device=model.device)
    inputs = plain_inputs(model, batch[0]) | {"input_ids": batch}
    try:
        together = model(**inputs).logits
    except CAN_GO_WRONG:
        return least
    rounding = max(deviation(together[0], expected[0]), deviation(together[1], expected[1]))
    return min(max(least, 3 * rounding), most)


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
    alone = torch.cat([logits[:-1] for logits in expected])  # all tokens but a row's first are targets
    if not deviation(found, alone) <= tolerance:  # nor where it is not a number
        return False

    short, long = rows[2], rows[3]
    inputs, _, _ = pack(model, [short, long, short])
    tokens = inputs["input_ids"].shape[1]
    before_last = tokens - len(short[0])
    return not depends_on(model, inputs, slice(before_last, tokens), slice(0, before_last))


def looks_ahead(model, rows) -> bool:
    """Does an output depend on later tokens?"""
    ids, _ = rows[0]
    inputs = plain_inputs(model, torch.tensor(ids, device=model.device))
    middle = len(ids) // 2
    return depends_on(model, inputs, slice(0, middle), slice(middle, len(ids)))


def depends_on(model, inputs: dict, outputs: slice, sources: slice) -> bool:
    """Do the logits at some positions have any gradient, however small, at the embeddings of some others?

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
    return bool(gradient[sources].any())


def shares_prefix(model, rows, tolerance, ways) -> bool:
    """Do rows behind a prefix that is read once equal whole rows alone?"""
    if model.config._attn_implementation != "rows":
        return False  # a row sees a prefix outside itself in our attention alone
    context = min(context_lengths(model.config), default=2**31)
    prefix = rows[0][0][: min(PREFIX, context // 2)]
    prefixed = []
    for ids, _ in rows[1:]:
        whole = (prefix + ids)[:context]
        prefixed.append((whole, [False] * (len(prefix) + 1) + [True] * (len(whole) - len(prefix) - 1)))

    in_one_pack = Ways(packed=True, shared_prefix=True, keeps_logits=ways.keeps_logits)
    found, _ = target_logits(model, prefixed, True, in_one_pack)
    alone, _ = target_logits(model, prefixed, False, Ways())
    return deviation(found, alone) <= tolerance


def has_plain_head(model, row, expected, tolerance) -> bool:
    """Are the logits hidden @ weight.T, and nothing else?"""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or model.base_model is model:
        return False
    inputs = plain_inputs(model, torch.tensor(row[0], device=model.device))
    hidden = model.base_model(**inputs).last_hidden_state[0]
    return deviation(hidden @ head.weight.T, expected) <= tolerance


def back_to_own_attention(model, rows) -> str | None:
    """Put the model's own attention back where "rows" does not give its logits -> a line that says so."""
    if model.config._attn_implementation != "rows" or model in _right_with_rows:
        return None
    ours = [tried_logits(model, ids) for ids, _ in rows]
    own = set_own_attention(model)
    try:
        expected = [plain_logits(model, ids) for ids, _ in rows]
    except InputError:
        model.set_attn_implementation("rows")
        raise
    tolerance = allowed_deviation(model, rows, expected)
    for found, wanted in zip(ours, expected, strict=True):
        if found is None or not deviation(found, wanted) <= tolerance:
            name = type(model).__name__
            return f"{name}: our attention computes something else, so it keeps its own ({own})"
    model.set_attn_implementation("rows")
    _right_with_rows.add(model)
    return None


def tried_logits(model, ids):
    try:
        return plain_logits(model, ids)
    except InputError:
        return None


def set_own_attention(model) -> str:
    """Put "sdpa" in the place of "rows", or "eager" where the model knows no other -> its name."""
    try:
        model.set_attn_implementation("sdpa")
    except CAN_GO_WRONG:
        model.set_attn_implementation("eager")
    return model.config._attn_implementation
