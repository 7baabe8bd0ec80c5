/* Activation functions of a vector. Included by _cpu_kernels.h. */

template <class S> inline typename S::V exponential(typename S::V x) {
    using V = typename S::V;
    x = S::at_least(S::at_most(x, S::all(88.0f)), S::all(-87.0f));
    const V n = S::round(S::mul(x, S::all(1.44269504f)));
    V f = S::fma(n, S::all(-0.693359375f), x);
    f = S::fma(n, S::all(2.12194440e-4f), f);
    V p = S::all(1.9875691500e-4f);
    constexpr float more[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : more) p = S::fma(p, f, S::all(c));
    p = S::fma(S::mul(f, f), p, S::add(f, S::all(1)));
    return S::mul(p, S::power_of_two(n));
}
template <class S> inline typename S::V sigmoid(typename S::V x) {
    const typename S::V one = S::all(1);
    return S::div(one, S::add(one, exponential<S>(S::sub(S::zero(), x))));
}
/* x Phi(x); Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most. */
template <class S> inline typename S::V gelu(typename S::V x) {
    using V = typename S::V;
    const V z = S::mul(S::absolute(x), S::all(0.70710678f)), one = S::all(1);
    const V t = S::div(one, S::fma(z, S::all(0.3275911f), one));
    V p = S::all(1.061405429f);
    constexpr float more[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    for (const float c : more) p = S::fma(p, t, S::all(c));
    const V tail = S::mul(S::mul(p, t), exponential<S>(S::sub(S::zero(), S::mul(z, z)))); /* erfc(z) */
    const V positive = S::at_least(x, S::zero());
    return S::sub(positive, S::mul(S::mul(S::absolute(x), S::all(0.5f)), tail));
}

template <class S>
inline typename S::V activate(const Activation &a, typename S::V gate, typename S::V up) {
    using V = typename S::V;
    gate = S::at_most(gate, S::all(a.gate_limit));
    V value;
    switch (a.kind) {
    case SILU: value = S::mul(gate, sigmoid<S>(S::mul(gate, S::all(a.alpha)))); break;
    case GELU: value = gelu<S>(gate); break;
    case GELU_TANH: {
        const V cube = S::mul(S::mul(gate, gate), gate);
        value = S::mul(gate, sigmoid<S>(S::mul(S::fma(cube, S::all(0.044715f), gate), S::all(1.5957691216f))));
        break;
    }
    case RELU: value = S::at_least(gate, S::zero()); break;
    default: value = S::at_least(gate, S::zero()), value = S::mul(value, value);
    }
    if (a.gate == NO_GATE) return value;
    value = S::at_most(value, S::all(a.activated_limit));
    up = S::at_least(S::at_most(up, S::all(a.up_limit)), S::all(-a.up_limit));
    return S::mul(value, S::add(up, S::all(a.up_offset)));
}
