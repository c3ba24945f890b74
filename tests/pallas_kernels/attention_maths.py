"""Softmax attention and its gradients, row by row in float64 numpy; shares no code with the library."""

import numpy as np


def arguments(shape, seed: int = 0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    b, t, s, h, g, k, v = shape
    sizes = ((b, t, h, k), (b, s, g, k), (b, s, g, v), (b, t, h, v))
    return tuple(rng.normal(size=size) for size in sizes)


def segments_of(shape, seed: int = 0):
    """Ids of queries and keys: packed documents, then padding; the queries carry the ids of the last keys."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((shape.b, shape.s)) < 0.15, axis=1) + 1
    for row, length in enumerate(rng.integers(shape.s // 2, shape.s + 1, shape.b)):
        ids[row, length:] = 0
    ids = ids.astype(np.int32)
    return ids[:, shape.s - shape.t :], ids


def poisoned(arrays, ids):
    """q, k, v with NaN wherever the id is 0."""
    q_ids, k_ids = ids
    return tuple(
        np.where(i[..., None, None] > 0, x, np.nan) for i, x in zip((q_ids, k_ids, k_ids), arrays)
    )


def attention(q, k, v, cotangent, ids=None, window=None, scale=None):
    """The output, and the gradients of <output, cotangent> to q, k and v."""
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    y = np.zeros((b, t, h, v.shape[-1]))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for row in range(b):
        for i in range(t):
            last = i + s - t
            js = [
                j
                for j in range(last + 1)
                if (window is None or j > last - window)
                and (ids is None or (ids[0][row, i] == ids[1][row, j] > 0))
            ]
            if not js:
                continue
            for head in range(h):
                group = head // (h // g)
                keys, values = k[row, js, group], v[row, js, group]
                scores = scale * keys @ q[row, i, head]
                p = np.exp(scores - scores.max())
                p /= p.sum()
                y[row, i, head] = p @ values
                out = cotangent[row, i, head]
                dp = values @ out
                ds = scale * p * (dp - p @ dp)
                dq[row, i, head] += ds @ keys
                dk[row, js, group] += ds[:, None] * q[row, i, head]
                dv[row, js, group] += p[:, None] * out
    return y, (dq, dk, dv)


def near(actual, wanted, tolerance):
    """Largest error over the largest magnitude wanted."""
    actual, wanted = (np.asarray(x, np.float64) for x in (actual, wanted))
    scale = np.abs(wanted).max(initial=0) or 1.0
    np.testing.assert_allclose(actual / scale, wanted / scale, atol=tolerance, rtol=0)
