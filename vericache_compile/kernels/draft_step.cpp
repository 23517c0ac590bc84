// What a draft step does beside the model: where rows of the batch stand, and their new token's key and value.

// What is read in a step: shown[b] = positions[b], below `limit`, and places[i][b] = columns[b] + shifts[i][b].
extern "C" void begin_step(const int64_t* columns, const int64_t* shifts, int64_t count, int64_t batch,
                           const int64_t* positions, int64_t limit, int64_t* places, int64_t* shown) {
  for (int64_t b = 0; b < batch; ++b) shown[b] = positions[b] < limit ? positions[b] : limit - 1;
  for (int64_t i = 0; i < count * batch; ++i) places[i] = columns[i % batch] + shifts[i];
}

// One row of `bytes` per row of the batch and head, to the place of the former.
extern "C" void write_rows(const char* from, char* to, const int64_t* places, int64_t batch, int64_t heads,
                           int64_t bytes, int64_t from_batch, int64_t from_head, int64_t to_batch, int64_t to_head,
                           int64_t to_place) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(to + b * to_batch + h * to_head + places[b] * to_place, from + b * from_batch + h * from_head, bytes);
}

// Each row's token, the first one again where it is forced, to the next place of drafted [.][batch]; all move on by one.
extern "C" void end_step(const int64_t* made, const bool* forced, const int64_t* first, int64_t batch, int64_t* tokens,
                         int64_t* drafted, int64_t* place, int64_t* positions, int64_t* columns) {
  ++*place;
  for (int64_t b = 0; b < batch; ++b) {
    drafted[*place * batch + b] = tokens[b] = forced[b] ? first[b] : made[b];
    ++positions[b];
    ++columns[b];
  }
}
