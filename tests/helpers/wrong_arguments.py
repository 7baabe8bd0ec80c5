"""Arguments for the fuzz of native entries: right ones, and some that are wrong in one way."""

import torch

H, INNER, WRONG = 48, 32, 0.1  # features; the share of arguments that are wrong
COUNTS = (
    0,
    1,
    -1,
    2,
    3,
    63,
    64,
    65,
    200,
    2**31,
    2**31 - 1,
    -(2**31),
    2**32 + 1,
    2**63,
    -(2**63),
    2**64,
    None,
    1.5,
    "8",
)
SIZES = (0, 1, 2, 31, 49, 65, 1000)
DTYPES = (torch.float64, torch.int64, torch.bool, torch.complex64, torch.int8, torch.float8_e4m3fn, torch.float16)
KINDS = ("shape", "rank", "dtype", "device", "stride", "repeated", "freed", "none", "array", "number")


def tensor(draw, *shape, dtype=torch.float32):
    """Return a random tensor of the shape, or one that is wrong in one way."""
    kind = draw.choice(KINDS) if draw.random() < WRONG else "right"
    sizes = list(shape)
    if kind == "shape":
        sizes[draw.randrange(len(sizes))] = draw.choice(SIZES)
    if kind == "rank":
        sizes = draw.choice((sizes[1:], [*sizes, 1], [1, *sizes], []))
    if kind == "none":
        return None
    if kind == "number":
        return draw.choice(COUNTS)
    if kind == "stride":
        return torch.randn(*[2 * size for size in sizes]).to(dtype)[tuple(slice(None, None, 2) for _ in sizes)]
    if kind == "repeated":
        return torch.randn(*[1 for _ in sizes]).to(dtype).expand(*sizes)
    made = torch.randn(sizes).to(draw.choice(DTYPES) if kind == "dtype" else dtype)
    if kind == "freed":
        made.untyped_storage().resize_(0)
    return made.to("meta") if kind == "device" else made.numpy() if kind == "array" else made


def count(draw, right):
    return draw.choice(COUNTS) if draw.random() < WRONG / 2 else right


def numbers(draw, right):
    """Return a list of whole numbers, sometimes with a wrong one or of a wrong length."""
    found = [count(draw, number) if draw.random() < WRONG else number for number in right]
    return draw.choice((found[1:], [*found, 0], None, found * 40)) if draw.random() < WRONG / 2 else found


def near(found, expected, bound=1e-4):
    if found.is_meta:
        return
    wanted = expected.to(found.dtype)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    bound = max(bound, 4 * torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, equal_nan=True)
