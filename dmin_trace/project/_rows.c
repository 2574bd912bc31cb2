/* The inner loops of rotation (plan.py) on a CPU, called by backend_c.py. `_rows.pyi` documents the functions.

Every buffer's length is checked here against the others; a tensor is an address, whose length the caller knows. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One binary for all processors: the loops are compiled for several, and the loader picks. That needs glibc's ifunc. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef FOR_EACH_PROCESSOR
#define FOR_EACH_PROCESSOR
#endif

#ifdef _MSC_VER
#define RESTRICT __restrict
#else
#define RESTRICT restrict
#endif

/* Calls on fewer elements keep the GIL: getting it back from a busy thread can take longer than the work. */
#define LONG_TENSOR 262144

/* Elements that are squared, then added. The first loop only reads, which brings memory to the cache fastest, and the
   second finds the elements there. Squares are summed in float32 within a block, and in double beyond it. */
#define BLOCK_SIZE 1024

/* A row's shift and sign, or a sum's place and sign, share one number: a sign of minus one sets the highest bit. */
#define MINUS 0x80000000u
#define PLACE 0x7FFFFFFFu

/* The bits of a float32: those of an infinite number, which nan has too, and those of one. */
#define INFINITE 0x7F800000
#define ONE 0x3F800000u

/* A part of a row: its elements, of `size` bytes, the signs of its columns, and the row's sign. */
typedef struct {
    const char *x;
    const int8_t *signs;
    uint32_t minus;
} Part;

FOR_EACH_PROCESSOR
static float square_float32(const float *x, int64_t count)
{
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < count; i++)
        square += x[i] * x[i];
    return square;
}

/* A bfloat16 is the upper half of a float32. */
FOR_EACH_PROCESSOR
static float square_bfloat16(float *RESTRICT wide, const uint16_t *RESTRICT x, int64_t count)
{
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        wide[i] = value;
        square += value * value;
    }
    return square;
}

static inline float with_sign(float value, int8_t sign, uint32_t minus)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits ^= ((uint32_t)(int32_t)sign & MINUS) ^ minus;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The sum of the squares of a part, which is float32 afterwards: in `wide`, if it was not so before. */
static double square(Part *part, float *wide, int64_t count, int64_t size)
{
    if (size == sizeof(float))
        return square_float32((const float *)part->x, count);
    double squares = square_bfloat16(wide, (const uint16_t *)part->x, count);
    part->x = (const char *)wide;
    return squares;
}

FOR_EACH_PROCESSOR
static void add_part(float *RESTRICT sums, Part part, int64_t count)
{
    const float *RESTRICT x = (const float *)part.x;
    const int8_t *RESTRICT signs = part.signs;
    for (int64_t i = 0; i < count; i++)
        sums[i] += with_sign(x[i], signs[i], part.minus);
}

FOR_EACH_PROCESSOR
static void add_two_parts(float *RESTRICT sums, Part first, Part second, int64_t count)
{
    const float *RESTRICT x = (const float *)first.x, *RESTRICT y = (const float *)second.x;
    const int8_t *RESTRICT x_signs = first.signs, *RESTRICT y_signs = second.signs;
    for (int64_t i = 0; i < count; i++)
        sums[i] += with_sign(x[i], x_signs[i], first.minus) + with_sign(y[i], y_signs[i], second.minus);
}

/* What is counted of elements whose signs are added: minus the number of zeros, and the bits of the largest size. */
typedef struct {
    int32_t minus_zeros, largest;
} Counted;

/* The sign of a float32 of these bits, times the signs of its column and row. */
static inline float sign_of(uint32_t bits, int8_t sign, uint32_t minus, Counted *counted)
{
    int32_t size = (int32_t)(bits & ~MINUS);
    int32_t is_zero = -(size == 0);
    counted->minus_zeros += is_zero;
    counted->largest = size > counted->largest ? size : counted->largest;
    bits = ((bits ^ (uint32_t)(int32_t)sign ^ minus) & MINUS) | (ONE & ~(uint32_t)is_zero);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FOR_EACH_PROCESSOR
static Counted add_signs_float32(float *RESTRICT sums, Part part, int64_t count)
{
    const float *RESTRICT x = (const float *)part.x;
    const int8_t *RESTRICT signs = part.signs;
    Counted counted = {0, 0};
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        sums[i] += sign_of(bits, signs[i], part.minus, &counted);
    }
    return counted;
}

FOR_EACH_PROCESSOR
static Counted add_signs_bfloat16(float *RESTRICT sums, Part part, int64_t count)
{
    const uint16_t *RESTRICT x = (const uint16_t *)part.x;
    const int8_t *RESTRICT signs = part.signs;
    Counted counted = {0, 0};
    for (int64_t i = 0; i < count; i++)
        sums[i] += sign_of((uint32_t)x[i] << 16, signs[i], part.minus, &counted);
    return counted;
}

/* Adds the signs of at most BLOCK_SIZE elements instead of the elements. Returns how many are not zero, which is the
   sum of their squares, or nan if one is not finite. */
static double add_signs(float *sums, Part part, int64_t count, int64_t size)
{
    Counted counted =
        size == sizeof(float) ? add_signs_float32(sums, part, count) : add_signs_bfloat16(sums, part, count);
    return counted.largest < INFINITE ? (double)(count + counted.minus_zeros) : (double)NAN;
}

FOR_EACH_PROCESSOR
static void fold_sums(float *RESTRICT projected, const float *RESTRICT sums, const uint32_t *RESTRICT places,
                      int64_t width, int64_t dimension)
{
    memset(projected, 0, (size_t)dimension * sizeof *projected);
    for (int64_t first = 0; first < width; first += dimension) {
#pragma omp simd
        for (int64_t bin = 0; bin < dimension; bin++) {
            uint32_t place = places[first + bin];
            /* Whatever number it is, it lies within the sums. */
            projected[bin] += with_sign(sums[place & (uint32_t)(width - 1)], 0, place & MINUS);
        }
    }
}

/* Divides numbers, and returns the sum of the squares of what is left. */
FOR_EACH_PROCESSOR
static double divide_by(float *x, int64_t count, float divisor)
{
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < count; i++) {
        float value = x[i] / divisor;
        x[i] = value;
        square += (double)value * value;
    }
    return square;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* A tensor in memory: `count` elements, one after another if there is one channel; otherwise of float32, in groups of
   channels by places whose axes are exchanged: a convolution's gradient with its channels last. */
typedef struct {
    const char *x;
    int64_t count, channels, places;
} Tensor;

/* Lays `count` elements of 4 bytes, the first of which is element `from` of the tensor, one after another. */
static void lay(uint32_t *RESTRICT laid, Tensor tensor, int64_t from, int64_t count)
{
    int64_t channels = tensor.channels, group = channels * tensor.places, within = from % group;
    int64_t channel = within / tensor.places, place = within % tensor.places;
    const uint32_t *RESTRICT x = (const uint32_t *)tensor.x + (from - within);
    while (count > 0) {
        int64_t length = least(tensor.places - place, count);
        const uint32_t *RESTRICT first = x + place * channels + channel;
        /* Most convolutions are of 3 by 3 places: a loop of known length takes half as long. */
        if (length == 9)
            for (int64_t i = 0; i < 9; i++)
                laid[i] = first[i * channels];
        else
            for (int64_t i = 0; i < length; i++)
                laid[i] = first[i * channels];
        laid += length, count -= length, place = 0;
        if (++channel == channels)
            channel = 0, x += group;
    }
}

/* Adds the elements of a tensor, of `size` bytes, or their signs, the first of which is element `at` of the gradient;
   returns their squares. */
static double add_elements(float *sums, const int8_t *signs, const uint32_t *rows, int64_t width, int64_t at,
                           Tensor tensor, int64_t size, int as_signs)
{
    float wide[2][BLOCK_SIZE];
    double squares = 0;
    const char *x = tensor.x;
    int64_t count = tensor.count;
    while (count > 0) {
        const uint32_t *row = rows + at / width;
        int64_t column = at % width;
        if (column == 0 && count >= 2 * width && !as_signs && tensor.channels == 1) {
            /* Two whole rows at a time, in the order of the sums, which are then read and written half as often. */
            for (int64_t place = 0, length; place < width; place += length) {
                int64_t c = (place + width - (row[0] & PLACE)) % width, d = (place + width - (row[1] & PLACE)) % width;
                Part first = {x + c * size, signs + c, row[0] & MINUS};
                Part second = {x + (width + d) * size, signs + d, row[1] & MINUS};
                length = least(least(width - c, width - d), least(width - place, BLOCK_SIZE));
                squares += square(&first, wide[0], length, size);
                squares += square(&second, wide[1], length, size);
                add_two_parts(sums + place, first, second, length);
            }
            x += 2 * width * size, at += 2 * width, count -= 2 * width;
        } else {
            /* As far as the row goes, and the sums before they begin again. */
            int64_t place = (column + (row[0] & PLACE)) % width;
            int64_t length = least(least(width - column, width - place), least(count, BLOCK_SIZE));
            Part part = {x, signs + column, row[0] & MINUS};
            if (tensor.channels > 1) {
                lay((uint32_t *)wide[1], tensor, tensor.count - count, length);
                part.x = (const char *)wide[1];
            }
            if (as_signs) {
                squares += add_signs(sums + place, part, length, size);
            } else {
                squares += square(&part, wide[0], length, size);
                add_part(sums + place, part, length);
            }
            x += length * size, at += length, count -= length;
        }
    }
    return squares;
}

static void release(Py_buffer *buffers, int count)
{
    while (count-- > 0)
        PyBuffer_Release(&buffers[count]);
}

/* Gets the buffers of `count` arguments, the first of which is written, with elements of these sizes. On failure an
   exception is set and none is held. */
static int get_buffers(PyObject *const *args, Py_buffer *buffers, int count, const int *sizes)
{
    for (int k = 0; k < count; k++) {
        if (PyObject_GetBuffer(args[k], &buffers[k], k == 0 ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) {
            release(buffers, k);
            return -1;
        }
        if (buffers[k].len == 0 || buffers[k].len % sizes[k]) {
            PyErr_Format(PyExc_ValueError, "array %d has %zd bytes; expected elements of %d", k + 1, buffers[k].len,
                         sizes[k]);
            release(buffers, k + 1);
            return -1;
        }
    }
    return 0;
}

/* The k-th of the tensors, each (address, elements) or (address, elements, channels, places). Returns -1 with an
   exception set if it is none. */
static int get_tensor(PyObject *tensors, Py_ssize_t k, Tensor *tensor)
{
    PyObject *facts = PyList_GetItem(tensors, k);
    Py_ssize_t given = facts && PyTuple_Check(facts) ? PyTuple_Size(facts) : 0;
    if (given != 2 && given != 4) {
        PyErr_SetString(PyExc_TypeError, "expected (address, elements) or (address, elements, channels, places)");
        return -1;
    }
    tensor->x = PyLong_AsVoidPtr(PyTuple_GetItem(facts, 0));
    tensor->count = PyLong_AsLongLong(PyTuple_GetItem(facts, 1));
    tensor->channels = given == 4 ? PyLong_AsLongLong(PyTuple_GetItem(facts, 2)) : 1;
    tensor->places = given == 4 ? PyLong_AsLongLong(PyTuple_GetItem(facts, 3)) : 1;
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *add(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    static const int sizes[] = {4, 1, 4};
    Py_buffer buffers[3];
    Tensor tensor;
    double squares = 0;
    (void)module;
    if (given != 7 || !PyList_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError, "add takes 7 arguments, the fifth of which is a list");
        return NULL;
    }
    int64_t at = PyLong_AsLongLong(args[3]), size = PyLong_AsLongLong(args[5]);
    int as_signs = PyObject_IsTrue(args[6]);
    if (PyErr_Occurred() || get_buffers(args, buffers, 3, sizes) < 0)
        return NULL;
    int64_t width = buffers[1].len, room = width * (buffers[2].len / 4);
    int valid = buffers[0].len / 4 == width && at >= 0 && at <= room && (size == 2 || size == 4);
    for (Py_ssize_t k = 0; valid && k < PyList_Size(args[4]); k++) {
        if (get_tensor(args[4], k, &tensor) < 0) {
            release(buffers, 3);
            return NULL;
        }
        valid = tensor.count >= 0 && tensor.count <= room - at && tensor.channels > 0 && tensor.places > 0;
        /* Whole groups, none of which is larger than the tensor. */
        if (valid && tensor.channels > 1)
            valid = size == 4 && tensor.places <= tensor.count / tensor.channels &&
                    tensor.count % (tensor.channels * tensor.places) == 0;
        if (valid && tensor.count < LONG_TENSOR) {
            squares += add_elements(buffers[0].buf, buffers[1].buf, buffers[2].buf, width, at, tensor, size, as_signs);
        } else if (valid) {
            Py_BEGIN_ALLOW_THREADS
            squares += add_elements(buffers[0].buf, buffers[1].buf, buffers[2].buf, width, at, tensor, size, as_signs);
            Py_END_ALLOW_THREADS
        }
        at += tensor.count;
    }
    release(buffers, 3);
    if (!valid) {
        PyErr_SetString(PyExc_ValueError, "expected a sign for each sum, and elements of 2 or 4 bytes within the rows, "
                                          "of 4 in whole groups where there are channels");
        return NULL;
    }
    return PyFloat_FromDouble(squares);
}

static PyObject *fold(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    static const int sizes[] = {4, 4, 4};
    Py_buffer buffers[3];
    (void)module;
    if (given != 3) {
        PyErr_Format(PyExc_TypeError, "fold takes 3 arguments; found %zd", given);
        return NULL;
    }
    if (get_buffers(args, buffers, 3, sizes) < 0)
        return NULL;
    int64_t dimension = buffers[0].len / 4, width = buffers[1].len / 4;
    int valid = buffers[2].len / 4 == width && width % dimension == 0 && !(width & (width - 1));
    if (valid && width < LONG_TENSOR) {
        fold_sums(buffers[0].buf, buffers[1].buf, buffers[2].buf, width, dimension);
    } else if (valid) {
        Py_BEGIN_ALLOW_THREADS
        fold_sums(buffers[0].buf, buffers[1].buf, buffers[2].buf, width, dimension);
        Py_END_ALLOW_THREADS
    }
    release(buffers, 3);
    if (!valid) {
        PyErr_SetString(PyExc_ValueError, "expected a place for each sum, a power of two of both, and a multiple "
                                          "of the projected gradient's");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *divide(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    static const int sizes[] = {4};
    Py_buffer x;
    (void)module;
    if (given != 2) {
        PyErr_Format(PyExc_TypeError, "divide takes 2 arguments; found %zd", given);
        return NULL;
    }
    double divisor = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred() || get_buffers(args, &x, 1, sizes) < 0)
        return NULL;
    double square = divide_by(x.buf, x.len / 4, (float)divisor);
    PyBuffer_Release(&x);
    return PyFloat_FromDouble(square);
}

static PyMethodDef functions[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, NULL},
    {"fold", (PyCFunction)(void (*)(void))fold, METH_FASTCALL, NULL},
    {"divide", (PyCFunction)(void (*)(void))divide, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_rows", .m_size = 0, .m_methods = functions, .m_slots = slots};

PyMODINIT_FUNC PyInit__rows(void)
{
    return PyModuleDef_Init(&definition);
}
