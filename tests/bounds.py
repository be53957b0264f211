"""The one table of how far two computations of the same thing may lie apart, and why. That of the C++ tests is in support.h.
Each was seen to hold with at least half of it to spare, where no exact reason is given."""

# fp32 has 2^-24 = 6e-8 a rounding, of values near 1. Sums of some hundred terms are taken in another order.
LOGITS_FP32 = 1e-5            # absolute; logits are of size 1 to 5, after two layers
GRADIENT_FP32 = 1e-5          # of the parameter's largest gradient; backward is twice as deep as forward
LOSS_FP32 = 1e-6              # relative, of one step: a mean over some hundred tokens
PERPLEXITY_FP32 = 1e-5        # relative: exp multiplies the loss's error by the loss, which is at most 10
MERGED_FP32 = 2.0**-22        # of the tensor's largest weight: W + scale B A, one rounding and that of a sum of r products
CURVE_FP32 = 1e-5             # relative, over 50 steps: rounding grows in any program (two transformers builds: 4e-6)

# The same tokens in the same step, otherwise cut into micro-batches, rows or ranks: only sums are taken in another order.
LAYOUT_LOSS = 5e-7            # relative, over ten steps
LAYOUT_GRAD_NORM = 5e-6       # relative; a norm adds the roundings of all gradients

LAYOUT_FP32 = 2e-6            # relative, over twenty steps on ranks that cut layers or deal them out
# A layer rounds its two outputs to 2^-9: eight roundings of four layers, independent for each of some 150 learnt tokens.
LAYOUT_BF16 = (8 / 150)**0.5 * 2.0**-9

# float32 whose inputs are codes of 8 bits: where such a last bit makes another code, one value of a layer differs by 1 / 127 of its row's largest.
LAYOUT_INT8 = (2e-5, 2e-4)    # relative, of loss and gradient norm over six steps (seen: 9e-6, 1e-4)

RESUMED_ELSEWHERE = 1e-6      # relative, of loss and metrics after a few steps: what is promised of another number of ranks
GRADIENT_NORM_FP32 = 1e-6     # relative: the square root of a sum that one side takes in fp64 over values that the file has in fp32
# A gradient reduced over ranks against one rank's: relative, and of the largest of all gradients.
REDUCED_GRADIENT_FP32 = (1e-5, 1e-6)

# fp64 has 2^-53 = 1e-16 a rounding.
LOSS_FP64 = 5e-13             # relative, of one step
CURVE_FP64 = 5e-12            # relative, over 50 steps
GRADIENT_FP64 = 2.0**-24      # of the parameter's largest gradient: the file has them rounded to fp32, once

# bf16 has 2^-9 = 2e-3 a rounding, fp16 2^-12 = 2e-4, at every layer's output; masters and sums are fp32.
CURVE_BF16 = 5e-3             # relative, over 50 steps, against our own fp32
CURVE_FP16 = 1e-3
LOGITS_BF16 = 1e-2            # norm of the difference / norm, after two layers
# LLM.int8() rounds inputs to 8 bits, which makes steps of what rounds otherwise: bitsandbytes' own logits move by 0.018 where one code
# of weights in a thousand is the next one. Logits of inputs that are not quantized are no farther: one layer tells these apart.
LOGITS_INT8 = 4e-2
# One layer of it: theirs rounds products of codes, and what columns of outliers add, to float16.
LAYER_INT8 = 4e-5             # norm of the difference / norm (seen: 2e-5; inputs that are not quantized: 7e-3)
LAYER_INT8_OUTLIERS = 6e-4    # where a column of inputs is 30 times the others' (seen: 2.5e-4; 3e-3)
CURVE_INT8 = 7.5e-5           # relative, over 50 steps in fp32 (seen: 4e-5; weights that are not quantized: 1.3e-4)
GRADIENT_FP16 = 1e-2          # norm of the difference / norm, of a parameter
