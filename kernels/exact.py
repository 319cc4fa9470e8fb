"""Normal numbers from random words by Box–Muller, with the same bits on every device.

The logarithm, sine and cosine of a machine's library differ in the last bit from those of another machine. Here they
are polynomials, evaluated by single-precision additions and multiplications that IEEE 754 rounds exactly, in a fixed
order; so torch on a CPU, torch on a GPU and Triton (compiled without fusing a multiplication with an addition) agree
to the bit. Errors against exact arithmetic are below 3e-7.

    u = (word₀ >> 9 + ½)·2⁻²³      r = √(−2 ln u)      z₀ = r·cos 2πv
    v = (word₁ >> 9 + ½)·2⁻²³                          z₁ = r·sin 2πv

Both are exact in fp32 and inside (0, 1), so |z| ≤ √(48 ln 2) < 5.77.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.kernels.language import jit, tl

# ln(1+f) = f − f²/2 + f³·P(f) for 1+f in [√½, √2]; P fitted to 1.4e-7.
LOG = (0.33333327, -0.25000281, 0.2000188, -0.16643488, 0.14190238, -0.1294342, 0.12798897, -0.08305378)
# sin(πx/2) = x·S(x²) and cos(πx/2) = 1 + x²·C(x²) for |x| ≤ ½; fitted to 5e-9.
SIN = (1.57079632, -0.64596348, 0.07968023, -0.00460218)
COS = (-1.2337005, 0.25366941, -0.0208615297, 0.000906743540)
# ln 2 in two parts: a multiple of the first by an exponent is exact.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's scheme, one rounding for each multiplication and addition."""
    y = x * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        y.add_(c).mul_(x)
    return y.add_(coefficients[0])


def box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, fp32, from two tensors of random 32-bit words (int64)."""
    u = ((word0 >> 9).float() + 0.5).mul_(2.0**-23)
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32).sub_(1.0)
    e = exponent.float()
    square = f * f
    log = _polynomial(f, LOG).mul_(f).mul_(square)
    log.add_(e * LN2_LOW).sub_(square.mul_(0.5)).add_(f).add_(e.mul_(LN2_HIGH))
    # Some builds of torch round fp32 roots loosely; through fp64 the result is the exactly rounded one.
    radius = log.mul_(-2.0).double().sqrt_().float()

    turn = word1 >> 9
    quadrant = (turn + (1 << 20)) >> 21
    x = (turn - (quadrant << 21)).float().add_(0.5).mul_(2.0**-21)
    square = x * x
    sine = _polynomial(square, SIN).mul_(x)
    cosine = _polynomial(square, COS).mul_(square).add_(1.0)
    odd = (quadrant & 1).bool()
    z0 = torch.where(odd, sine, cosine).mul_(1 - (quadrant + 1 & 2)).mul_(radius)
    z1 = torch.where(odd, cosine, sine).mul_(1 - (quadrant & 2)).mul_(radius)
    return z0, z1


@jit
def box_muller_tile(word0, word1):
    """`box_muller` of uint32 tiles, operation for operation."""
    u = ((word0 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    square = f * f
    log = f * -0.08305378 + 0.12798897
    log = log * f - 0.1294342
    log = log * f + 0.14190238
    log = log * f - 0.16643488
    log = log * f + 0.2000188
    log = log * f - 0.25000281
    log = log * f + 0.33333327
    log = log * f * square + e * -2.12194440e-4 - square * 0.5 + f + e * 0.693359375
    radius = tl.sqrt_rn(log * -2.0)

    turn = (word1 >> 9).to(tl.int32)
    quadrant = (turn + 1048576) >> 21
    x = ((turn - (quadrant << 21)).to(tl.float32) + 0.5) * 4.76837158203125e-07
    square = x * x
    sine = square * -0.00460218 + 0.07968023
    sine = sine * square - 0.64596348
    sine = (sine * square + 1.57079632) * x
    cosine = square * 0.000906743540 - 0.0208615297
    cosine = cosine * square + 0.25366941
    cosine = (cosine * square - 1.2337005) * square + 1.0
    odd = (quadrant & 1) != 0
    z0 = tl.where(odd, sine, cosine) * (1 - ((quadrant + 1) & 2)).to(tl.float32) * radius
    z1 = tl.where(odd, cosine, sine) * (1 - (quadrant & 2)).to(tl.float32) * radius
    return z0, z1
