// Whether ELEM is float, for the preprocessor.
//
// An entry for ELEM and its twin for float (..._f32) are then the same function. Of the two that
// one is compiled which is launched: for a norm the former, for a product the latter.
#pragma once

#define ELEM_IS_FLOAT ELEM_IS(ELEM)
#define ELEM_IS(elem) ELEM_IS_(elem)
#define ELEM_IS_(elem) ELEM_IS_##elem
#define ELEM_IS_float 1
