"""The primitives of JAX, grouped by their effect on paths."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Those that change no number, or only its precision.
SAME = _names(
    'convert_element_type copy copy_p stop_gradient reduce_precision sharding_constraint '
    'mesh_cast reshard pvary name'
)
#: Those that return all their arguments unchanged.
PASSED_ON = _names('optimization_barrier device_put')
UNARY = SAME | _names(
    'abs neg sign floor ceil round exp exp2 expm1 log log1p sqrt rsqrt cbrt square integer_pow '
    'logistic tanh sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erf_inv lgamma '
    'digamma is_finite not real imag population_count clz bitcast_convert_type'
)
NARY = _names(
    'add sub mul div rem max min pow atan2 nextafter add_any and or xor eq ne lt le gt ge '
    'shift_left shift_right_logical shift_right_arithmetic clamp'
)
#: Rearrangements after which a tensor is still the whole of what it was, in the same order.
WHOLE = _names('reshape broadcast_in_dim squeeze expand_dims')
#: All in which each output entry is one input entry: liveness moves as numbers do.
MOVES = WHOLE | _names('transpose rev slice split unstack tile')
JOINS = _names('concatenate stack pad')
REDUCTIONS = _names(
    'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin'
)
CUMULATIVE = _names('cumsum cumprod cummax cummin cumlogsumexp')
WINDOWS = _names('reduce_window_sum reduce_window_max reduce_window_min reduce_window')
#: Those whose effect is decided at run time.
RUN_TIME = _names('cond while')
#: Never negative, and zero only for what is very negative.
POSITIVE = _names('exp exp2 logistic')
#: Functions of a statistic by which a tensor may still be normalised.
OF_STATISTICS = SAME | _names('abs log sqrt rsqrt square integer_pow')
ARITHMETIC = _names('add sub mul div max min pow add_any')
#: Functions that leave a very negative number very negative.
KEEPS_LOW = SAME | _names('floor ceil round real')
#: Functions of one argument that are zero at zero.
ODD = SAME | _names(
    'neg sign floor ceil round sqrt cbrt square tanh sin tan asin atan sinh asinh atanh erf '
    'erf_inv expm1 log1p abs real imag'
)
#: Numbers that nothing else makes: positions, sizes that `jax.export` leaves open, random bits.
MADE = _names(
    'iota dim_as_value random_bits rng_uniform rng_bit_generator random_seed random_wrap '
    'random_unwrap random_split random_fold_in random_clone random_gamma threefry2x32'
)
