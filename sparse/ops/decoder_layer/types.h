// What the kernels take; the structures mirror those in native.py.
#pragma once

#include <cstdint>

namespace decoder_layer {

constexpr int64_t kTileRows = 16;  // rows that are multiplied at once
constexpr int64_t kStep = 32;      // inputs of one product of tiles; rows of panels are padded to a multiple
constexpr int64_t kStrip = 16;     // positions of the cache that lie together
constexpr int64_t kPage = 256;       // positions of a page of the cache
constexpr int64_t kChunk = 16;     // strips whose softmax is computed at once

// Packed weights of a linear map. The outputs go in groups of twice sixteen: group g holds the columns from g * stride
// and those from g * stride + pair.
struct Matrix {
  const void* weights;
  const float* bias;  // [outputs], null without
  int64_t inputs, outputs, groups, stride, pair;
};

// The tokens of one sequence in a step.
struct Segment {
  int64_t first, count;      // tokens of the step
  int64_t start, before;     // positions of the cache before the step's draft, and tokens of it that ran earlier
  const int64_t* positions;  // [count]: of the tokens
  void *keys, *values;       // [pages, kv_heads, head_dim, page] and [pages, kv_heads, page, head_dim]
  const uint8_t* visible;    // [count, before + count]: which tokens of the draft a token sees; null for a chain
  int64_t* blocks;           // [kv_heads, chosen], ascending or not; null attends to everything
  const int64_t* kept;       // [kv_heads]: so many of `blocks` count; null for all
  int64_t chosen, tail;      // blocks per KV head; position from which on everything is attended to
  // [kv_heads, head_dim, summary_stride]: what blocks are chosen by, as Job.score says; null: the blocks are given.
  const void *summary, *second;
  int64_t summary_stride, whole, sinks, window;
  const float* shares;  // [count]: of the tokens in the queries that choose; null: see Job.every_row
  void* queries;             // [kv_heads, padded rows * groups, head_dim]: rotated, scaled
};

// The attention half of a layer. With beside_norm the projections read rows beside the hidden states too.
struct Attention {
  const void *norm, *beside_norm;  // [hidden]
  const Matrix* qkv;
  const Matrix* output;
  const void *query_norm, *key_norm;  // [head_dim], null without
  const void *cos, *sin;              // [positions, head_dim]
  int64_t hidden, heads, kv_heads, head_dim;
  float eps, scale;
};

// The feed-forward half of a layer; gate_up pairs each channel's gate with its up.
struct FeedForward {
  const void* norm;
  const Matrix *gate_up, *down;
  float eps;
};

// The feed-forward half of a layer whose channels are chosen: all gates are computed, of the chosen channels up and down.
struct SparseFeedForward {
  const void* norm;
  const Matrix* gate;
  const void* channels;  // [width, 2 * hidden]: row of up, column of down
  int64_t hidden, width;
  float eps;
};

enum Score : int64_t { kMean, kBound, kGaussian };

// Half a layer for the tokens of a step: all but one of attention, feed_forward and sparse are null. parts: 1 projects, stores keys and
// values and leaves the queries in the segments, 2 attends from there on, 3 does both. block_size belongs to the blocks
// of the segments, whose scores are those of sparse.scoring.block_scores: by the mean key (kMean), by bounds of summary =
// minimum and second = maximum (kBound), by summary = mean and second = variance (kGaussian); of the first token, of the
// sum of all tokens by their shares, or with every_row the best of all tokens; over the query heads of a KV head their
// mean or, with reduce_max, their maximum. beside [tokens, hidden] stands before the hidden states in what is projected,
// each part normed; null without.
//
// Of a sparse half the first `ranked` tokens say which channels count, by the maximum of their magnitudes or by sums
// weighted with survival; `keep` of them are chosen, or with keep = 0 those of at least `threshold`. chosen [2 + width]
// takes their number and then the channels, ascending.
struct Job {
  const Attention* attention;
  const FeedForward* feed_forward;
  const SparseFeedForward* sparse;
  const Segment* segments;
  const void* beside;
  const float* survival;
  int64_t* chosen;
  int64_t number, parts, block_size, score, every_row, reduce_max, ranked, keep;
  float threshold;
};

inline int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace decoder_layer
