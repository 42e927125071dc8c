/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GATEDELTA_H
#define GATEDELTA_H

/** @file
 * The C interface (C99), for C and for every language that calls C. It is the C++ interface (operator.hpp has the equations and
 * what each tensor means) in plain structs and functions:
 *
 * - A function that can fail returns a ::gatedelta_status. Its message names the tensor or option, what was expected and what
 *   was found; it is kept per thread, see gatedelta_last_error(). No function throws, prints or exits, and a call that fails
 *   has changed nothing, except for #GATEDELTA_ERROR_DEVICE.
 * - Every struct starts with its size as the caller was compiled, so that programs and libraries of different versions fit:
 *   what a shorter struct lacks has its default. What a longer struct has beyond this library's must be zero, or the call fails
 *   with #GATEDELTA_ERROR_UNSUPPORTED. Structs grow only at the end, and zero in a later field means what was before it.
 * - Structs are read during a call and never kept; memory of tensors stays the caller's.
 * - Booleans are int32_t, 0 or 1. Enumerations are int32_t with fixed values. */

#include <stddef.h>
#include <stdint.h>

#include "gatedelta/macros.h"

#ifdef __cplusplus
extern "C" {
#endif

/** The result of a call: 0, or why it failed. */
typedef int32_t gatedelta_status;
/** Values of ::gatedelta_status; those from 1 to 4 are gatedelta::ErrorCode. */
enum {
  GATEDELTA_SUCCESS = 0,                /**< no error */
  GATEDELTA_ERROR_INVALID_ARGUMENT = 1, /**< a tensor, slot, size or option is wrong; nothing was changed */
  GATEDELTA_ERROR_UNSUPPORTED = 2,      /**< well formed, but no selected backend does it; the message has the reason */
  GATEDELTA_ERROR_OUT_OF_MEMORY = 3,    /**< a host or device allocation failed */
  GATEDELTA_ERROR_DEVICE = 4,           /**< the device reported an error, or a kernel met a bad slot */
  GATEDELTA_ERROR_OTHER = 255           /**< an exception that is not the library's, of a backend added in C++, say */
};

/** Element type. Index tensors are i32 or i64, all others f32, f16 or bf16. */
typedef int32_t gatedelta_dtype;
/** Values of ::gatedelta_dtype. */
enum {
  GATEDELTA_F32 = 0,  /**< IEEE binary32 */
  GATEDELTA_F16 = 1,  /**< IEEE binary16 */
  GATEDELTA_BF16 = 2, /**< bfloat16: the upper half of a binary32 */
  GATEDELTA_I32 = 3,  /**< int32_t */
  GATEDELTA_I64 = 4   /**< int64_t */
};

/** Where memory lives. */
typedef int32_t gatedelta_device_type;
/** Values of ::gatedelta_device_type. */
enum {
  GATEDELTA_DEVICE_CPU = 0, /**< host memory, pinned memory included */
  GATEDELTA_DEVICE_CUDA = 1 /**< an NVIDIA GPU */
};

/** Where the decay exp(g) comes from. */
typedef int32_t gatedelta_gate_form;
/** Values of ::gatedelta_gate_form. */
enum {
  GATEDELTA_GATE_RAW = 0,       /**< g = -exp(A_log[h]) * softplus(a + dt_bias[h]); dt_bias may be left out */
  GATEDELTA_GATE_LOG_DECAY = 1, /**< g is given: the natural logarithm of the decay */
  GATEDELTA_GATE_NONE = 2       /**< g = 0: plain DeltaNet */
};

/** Where beta comes from. */
typedef int32_t gatedelta_beta_form;
/** Values of ::gatedelta_beta_form. */
enum {
  GATEDELTA_BETA_LOGITS = 0,       /**< sigmoid(b) */
  GATEDELTA_BETA_TWICE_LOGITS = 1, /**< 2 * sigmoid(b) */
  GATEDELTA_BETA_VALUE = 2,        /**< beta is given */
  GATEDELTA_BETA_ONE = 3           /**< beta = 1 */
};

/** A strided view of the caller's memory. A tensor that a call is made without is a null pointer to this struct. */
typedef struct gatedelta_tensor {
  uint64_t size;                     /**< sizeof(gatedelta_tensor) */
  void* data;                        /**< the element at index 0 of every dimension */
  const int64_t* shape;              /**< `rank` sizes, in elements */
  const int64_t* strides;            /**< `rank` strides, in elements; null: row-major and dense */
  gatedelta_dtype dtype;             /**< of the elements */
  int32_t rank;                      /**< number of dimensions, 1 to 5 */
  gatedelta_device_type device_type; /**< where `data` is */
  int32_t device_index;              /**< ordinal of the device; 0 for host memory */
} gatedelta_tensor;

/** What is fixed for the life of an operator. Fill with gatedelta_config_init(), then set heads and widths. */
typedef struct gatedelta_config {
  uint64_t size;                   /**< sizeof(gatedelta_config) */
  int64_t q_heads;                 /**< HQ; H = max(HQ, HK, HV), and each count divides H */
  int64_t k_heads;                 /**< HK */
  int64_t v_heads;                 /**< HV */
  int64_t key_dim;                 /**< K */
  int64_t value_dim;               /**< V */
  gatedelta_dtype q_dtype;         /**< of q; this and all other dtypes: f32 (default), f16 or bf16 */
  gatedelta_dtype k_dtype;         /**< of k */
  gatedelta_dtype v_dtype;         /**< of v */
  gatedelta_dtype o_dtype;         /**< of o */
  gatedelta_dtype gate_dtype;      /**< of a or g */
  gatedelta_dtype beta_dtype;      /**< of b or beta */
  gatedelta_dtype A_log_dtype;     /**< of A_log */
  gatedelta_dtype dt_bias_dtype;   /**< of dt_bias */
  gatedelta_dtype state_dtype;     /**< of state, state_in and state_out */
  gatedelta_dtype snapshots_dtype; /**< of snapshots */
  gatedelta_gate_form gate;        /**< default: raw */
  gatedelta_beta_form beta;        /**< default: logits */
  int32_t qk_l2norm;               /**< q and k are normalised; default 1 */
  int32_t num_threads;             /**< of the host backends; 0 (default) takes OpenMP's own default */
  double l2_eps;                   /**< added to the sum of squares, inside the root; default 1e-6 */
  int32_t has_scale;               /**< 1: `scale` is used; 0 (default): 1/sqrt(K) */
  int32_t reserved;                /**< 0 */
  double scale;                    /**< of the output */
  double softplus_beta;            /**< default 1 */
  double softplus_threshold;       /**< softplus(x) = x where softplus_beta * x is above this; default 20 */
  int64_t null_slot;               /**< a slot <= null_slot marks padding; default -1 */
} gatedelta_config;

/** Sizes of replay windows (window.hpp says what these are), by gatedelta_window_layout_init(). Read them, do not set them. */
typedef struct gatedelta_window_layout {
  uint64_t size;           /**< sizeof(gatedelta_window_layout) */
  int64_t slots;           /**< of the pool */
  int64_t capacity;        /**< W: the entries of a slot, 4 to 64 */
  int64_t ring;            /**< R = W + the most tokens of a step */
  int64_t k_heads;         /**< HK */
  int64_t heads;           /**< H */
  int64_t key_dim;         /**< K */
  int64_t value_dim;       /**< V */
  gatedelta_dtype entries; /**< of keys, as given, and corrections: f32 or bf16 */
  int32_t reserved;        /**< 0 */
  uint64_t layer_bytes;    /**< memory of the windows of one layer */
  uint64_t record_bytes;   /**< memory of the record, once for all layers */
} gatedelta_window_layout;

/** The replay windows of one layer, in the caller's memory. */
typedef struct gatedelta_window {
  uint64_t size;                         /**< sizeof(gatedelta_window) */
  const gatedelta_window_layout* layout; /**< sizes */
  void* layer;                           /**< layout->layer_bytes, 256-byte aligned; null: the record alone is meant */
  void* record;                          /**< layout->record_bytes, 256-byte aligned, the same for all layers; reset it once */
  gatedelta_device_type device_type;     /**< where both are */
  int32_t device_index;                  /**< ordinal of the device; 0 for host memory */
} gatedelta_window;

/** One call: gatedelta::Arguments, which has all rules. Fill with gatedelta_arguments_init(), then set what is used. */
typedef struct gatedelta_arguments {
  uint64_t size;                       /**< sizeof(gatedelta_arguments) */
  const gatedelta_tensor* q;           /**< [B,T,HQ,K] */
  const gatedelta_tensor* k;           /**< [B,T,HK,K] */
  const gatedelta_tensor* v;           /**< [B,T,HV,V] */
  const gatedelta_tensor* o;           /**< written: [B,T,H,V] */
  const gatedelta_tensor* a;           /**< [B,T,H], gate form raw */
  const gatedelta_tensor* g;           /**< [B,T,H], gate form log decay */
  const gatedelta_tensor* A_log;       /**< [H], gate form raw */
  const gatedelta_tensor* dt_bias;     /**< [H], optional with gate form raw */
  const gatedelta_tensor* b;           /**< [B,T,H], beta forms logits and twice logits */
  const gatedelta_tensor* beta;        /**< [B,T,H], beta form value */
  const gatedelta_tensor* state;       /**< read and written: the pool [slots,H,V,K] */
  const gatedelta_tensor* read_slots;  /**< [N], i32 or i64 */
  const gatedelta_tensor* write_slots; /**< [N], i32 or i64 */
  const gatedelta_tensor* token_slots; /**< [N,S], S >= T, i32 or i64 */
  const gatedelta_tensor* accepted;    /**< [N], i32, 1..S: row n starts from slot token_slots[n, accepted[n]-1] */
  const gatedelta_tensor* state_in;    /**< [N,H,V,K], instead of a pool */
  const gatedelta_tensor* state_out;   /**< written: [N,H,V,K], instead of a pool */
  const gatedelta_tensor* snapshots;   /**< written: [N,>=T,H,V,K] */
  const gatedelta_tensor* cu_seqlens;  /**< [N+1], i32 or i64; then B is 1 and N the number of sequences */
  int32_t update_state;                /**< 0: the pool is only read; default 1 */
  int32_t dependent_launch;            /**< 1: cuda's kernel may begin before the one before it ended; default 0 (with a window
                                            it must not be the first call behind an accept) */
  void* stream;                        /**< cudaStream_t for device backends; host backends ignore it */
  void* workspace;                     /**< gatedelta_workspace_size() bytes on the tensors' device, 256-byte aligned */
  uint64_t workspace_size;             /**< bytes of `workspace` */
  const gatedelta_window* window;      /**< of this layer: `state` has checkpoints, and the tokens are appended; default null */
  const gatedelta_tensor* parent;      /**< [B,T] i32, with a window: draft trees; default null */
} gatedelta_arguments;

/** After verification with snapshots: state[write_slots[n]] = snapshots[n, accepted[n]-1]. */
typedef struct gatedelta_commit_arguments {
  uint64_t size;                       /**< sizeof(gatedelta_commit_arguments) */
  const gatedelta_tensor* snapshots;   /**< [N,S,H,V,K] */
  const gatedelta_tensor* accepted;    /**< [N], i32, 1..S */
  const gatedelta_tensor* state;       /**< written: [slots,H,V,K] */
  const gatedelta_tensor* write_slots; /**< [N], i32 or i64; rows <= null_slot are skipped */
  void* stream;                        /**< cudaStream_t for device backends */
} gatedelta_commit_arguments;

/** Once a step, after gatedelta_forward() of all layers: slot n keeps accepted[n] of its T tokens (gatedelta::AcceptArguments).
 */
typedef struct gatedelta_accept_arguments {
  uint64_t size;                      /**< sizeof(gatedelta_accept_arguments) */
  const gatedelta_window* window;     /**< its record is read and written */
  const gatedelta_tensor* slots;      /**< [N], i32 or i64; null: row n has slot n. Slots <= null_slot are skipped */
  const gatedelta_tensor* accepted;   /**< [N], i32, 0..T */
  const gatedelta_tensor* cu_seqlens; /**< [N+1], i32 or i64, as in the calls of this step; or null */
  const gatedelta_tensor* path;       /**< [N,>=accepted], i32, for trees: the tokens that stay, ascending; null: the first */
  int64_t tokens;                     /**< T of each row, unless cu_seqlens are given */
  void* stream;                       /**< cudaStream_t for device backends */
} gatedelta_accept_arguments;

/** Empties the windows of slots: once for every slot, and for each that starts a new sequence (gatedelta::ResetArguments). */
typedef struct gatedelta_reset_arguments {
  uint64_t size;                  /**< sizeof(gatedelta_reset_arguments) */
  const gatedelta_window* window; /**< its record is written */
  const gatedelta_tensor* slots;  /**< [N], i32 or i64; null: all. Slots <= null_slot are skipped */
  void* stream;                   /**< cudaStream_t for device backends */
} gatedelta_reset_arguments;

/** The states that checkpoints and windows of a layer stand for (gatedelta::FoldArguments). */
typedef struct gatedelta_fold_arguments {
  uint64_t size;                  /**< sizeof(gatedelta_fold_arguments) */
  const gatedelta_window* window; /**< of the layer; only read */
  const gatedelta_tensor* state;  /**< [slots,H,V,K]; written by gatedelta_window_fold() */
  const gatedelta_tensor* slots;  /**< [N], i32 or i64; slots <= null_slot are skipped */
  const gatedelta_tensor* out;    /**< [N,H,V,K], f32, f16 or bf16; written by gatedelta_window_state_of(); else null */
  void* stream;                   /**< cudaStream_t for device backends */
} gatedelta_fold_arguments;

/** Slot to[n] becomes a copy of slot from[n] (gatedelta::ForkArguments). */
typedef struct gatedelta_fork_arguments {
  uint64_t size;                  /**< sizeof(gatedelta_fork_arguments) */
  const gatedelta_window* window; /**< of the layer, or with a null `layer` the record */
  const gatedelta_tensor* state;  /**< [slots,H,V,K], read and written; null: the record is copied */
  const gatedelta_tensor* from;   /**< [N], i32 or i64 */
  const gatedelta_tensor* to;     /**< [N], i32 or i64 */
  void* stream;                   /**< cudaStream_t for device backends */
} gatedelta_fork_arguments;

/** An operator: configured once, called many times, also from several threads at once. */
typedef struct gatedelta_rule gatedelta_rule;

/** The version of the library that is linked, e.g. "0.1.0". */
GATEDELTA_API const char* gatedelta_version(void);
/** The message of the last call that failed in this thread; "" if none did. Valid until the next one fails. */
GATEDELTA_API const char* gatedelta_last_error(void);
/** "success", "invalid argument", "unsupported", "out of memory", "device error" or "unknown error". */
GATEDELTA_API const char* gatedelta_status_name(gatedelta_status status);

/** A dense row-major view of host memory; for strides or a device set the fields. `shape` must live as long as the view. */
static inline gatedelta_tensor gatedelta_view(void* data, gatedelta_dtype dtype, int32_t rank, const int64_t* shape) {
  gatedelta_tensor view;
  view.size = sizeof view;
  view.data = data;
  view.shape = shape;
  view.strides = NULL;
  view.dtype = dtype;
  view.rank = rank;
  view.device_type = GATEDELTA_DEVICE_CPU;
  view.device_index = 0;
  return view;
}

/** Sets every field to its default. `size` is sizeof(gatedelta_config); the same in the functions below. */
GATEDELTA_API gatedelta_status gatedelta_config_init(gatedelta_config* config, size_t size);
/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_arguments_init(gatedelta_arguments* arguments, size_t size);
/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_commit_arguments_init(gatedelta_commit_arguments* arguments, size_t size);

/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_accept_arguments_init(gatedelta_accept_arguments* arguments, size_t size);
/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_reset_arguments_init(gatedelta_reset_arguments* arguments, size_t size);
/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_fold_arguments_init(gatedelta_fold_arguments* arguments, size_t size);
/** Sets every field to its default: no tensor. */
GATEDELTA_API gatedelta_status gatedelta_fork_arguments_init(gatedelta_fork_arguments* arguments, size_t size);
/** Sets every field to its default: host memory, no addresses. */
GATEDELTA_API gatedelta_status gatedelta_window_init(gatedelta_window* window, size_t size);
/** Computes the sizes of replay windows. `slots`: of the pool; `capacity`: W, 4 to 64; `entries`: bf16 or f32; `max_tokens`:
 * the most tokens of a row in one call, 1 to W, or 0: W. */
GATEDELTA_API gatedelta_status gatedelta_window_layout_init(gatedelta_window_layout* layout, size_t size,
                                                            const gatedelta_config* config, int64_t slots, int64_t capacity,
                                                            gatedelta_dtype entries, int64_t max_tokens);

/** Makes an operator, to be freed with gatedelta_rule_destroy(). `backend` is a name, or "auto": for each call the first one
 * that is available, supports it and reaches the tensors' memory. Null or empty: the environment variable GATEDELTA_BACKEND,
 * or else auto. On failure *rule is null. */
GATEDELTA_API gatedelta_status gatedelta_rule_create(const gatedelta_config* config, const char* backend,
                                                     gatedelta_rule** rule);
/** Frees an operator; null is fine. Calls on it must have returned. */
GATEDELTA_API void gatedelta_rule_destroy(gatedelta_rule* rule);
/** Runs a call. Host backends have finished when it returns; device backends have enqueued their work on the stream. */
GATEDELTA_API gatedelta_status gatedelta_forward(const gatedelta_rule* rule, const gatedelta_arguments* arguments);
/** Copies accepted snapshots into the pool. */
GATEDELTA_API gatedelta_status gatedelta_commit(const gatedelta_rule* rule, const gatedelta_commit_arguments* arguments);
/** Keeps the accepted tokens of the last gatedelta_forward() in the replay windows: once for all layers. */
GATEDELTA_API gatedelta_status gatedelta_window_accept(const gatedelta_rule* rule, const gatedelta_accept_arguments* arguments);
/** Empties replay windows: once for all layers. */
GATEDELTA_API gatedelta_status gatedelta_window_reset(const gatedelta_rule* rule, const gatedelta_reset_arguments* arguments);
/** Folds replay windows of one layer into its checkpoints. After the last layer, reset the slots. */
GATEDELTA_API gatedelta_status gatedelta_window_fold(const gatedelta_rule* rule, const gatedelta_fold_arguments* arguments);
/** Writes the states of one layer that checkpoints and windows stand for to `out`; changes nothing else. */
GATEDELTA_API gatedelta_status gatedelta_window_state_of(const gatedelta_rule* rule, const gatedelta_fold_arguments* arguments);
/** Forks sequences: those of one layer, or the record. */
GATEDELTA_API gatedelta_status gatedelta_window_copy(const gatedelta_rule* rule, const gatedelta_fork_arguments* arguments);
/** Bytes of workspace that gatedelta_forward() of these arguments needs (0 for the host backends). */
GATEDELTA_API gatedelta_status gatedelta_workspace_size(const gatedelta_rule* rule, const gatedelta_arguments* arguments,
                                                        size_t* bytes);
/** The name of the backend that gatedelta_forward() of these arguments uses; valid for the life of the process. */
GATEDELTA_API gatedelta_status gatedelta_backend_for(const gatedelta_rule* rule, const gatedelta_arguments* arguments,
                                                     const char** name);

/** Checks a configuration alone. */
GATEDELTA_API gatedelta_status gatedelta_validate_config(const gatedelta_config* config);
/** Checks a call against a configuration: shapes, dtypes, devices, combinations. No tensor is read. */
GATEDELTA_API gatedelta_status gatedelta_validate(const gatedelta_config* config, const gatedelta_arguments* arguments);
/** Checks a commit against a configuration. No tensor is read. */
GATEDELTA_API gatedelta_status gatedelta_validate_commit(const gatedelta_config* config,
                                                         const gatedelta_commit_arguments* arguments);

/** Checks the arguments of gatedelta_window_accept(). No tensor is read; the same in the functions below. */
GATEDELTA_API gatedelta_status gatedelta_validate_accept(const gatedelta_config* config,
                                                         const gatedelta_accept_arguments* arguments);
/** Checks the arguments of gatedelta_window_reset(). */
GATEDELTA_API gatedelta_status gatedelta_validate_reset(const gatedelta_config* config,
                                                        const gatedelta_reset_arguments* arguments);
/** Checks the arguments of gatedelta_window_fold() or gatedelta_window_state_of(). */
GATEDELTA_API gatedelta_status gatedelta_validate_fold(const gatedelta_config* config,
                                                       const gatedelta_fold_arguments* arguments);
/** Checks the arguments of gatedelta_window_copy(). */
GATEDELTA_API gatedelta_status gatedelta_validate_fork(const gatedelta_config* config,
                                                       const gatedelta_fork_arguments* arguments);

/** The number of backends. */
GATEDELTA_API gatedelta_status gatedelta_backend_count(size_t* count);
/** The name of backend `index` in the order in which auto tries them; valid for the life of the process. */
GATEDELTA_API gatedelta_status gatedelta_backend_name(size_t index, const char** name);
/** One line, e.g. the instruction set in use. `text` is valid until this thread next asks for a description or reason. */
GATEDELTA_API gatedelta_status gatedelta_backend_description(const char* backend, const char** text);
/** Whether a backend works on this machine; if not, `reason` (may be null; valid as above) says why. */
GATEDELTA_API gatedelta_status gatedelta_backend_available(const char* backend, int32_t* available, const char** reason);
/** Whether a backend can work on memory of a device. */
GATEDELTA_API gatedelta_status gatedelta_backend_reaches(const char* backend, gatedelta_device_type device_type,
                                                         int32_t device_index, int32_t* reaches);
/** Whether a backend does a call, which must be valid; if not, `reason` (may be null; valid as above) says why. Availability
 * and memory are questions of their own. */
GATEDELTA_API gatedelta_status gatedelta_backend_supports(const char* backend, const gatedelta_config* config,
                                                          const gatedelta_arguments* arguments, int32_t* supported,
                                                          const char** reason);
/** #GATEDELTA_ERROR_DEVICE if an earlier call met a fault on the device (a bad slot, say); waits for the stream. */
GATEDELTA_API gatedelta_status gatedelta_check(const char* backend, void* stream);
/** Waits for the stream, then checks it. */
GATEDELTA_API gatedelta_status gatedelta_synchronize(const char* backend, void* stream);

#ifdef __cplusplus
}
#endif

#endif
