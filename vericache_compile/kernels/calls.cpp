// Calls of C functions, recorded by Python, made in order without it.

#include <exception>

struct Call {
  void (*function)();
  const int64_t* arguments;  // whole numbers and addresses
  int64_t count;
};

constexpr int MOST_ARGUMENTS = 96;

template <int64_t... I>
static void call_with(void (*function)(), const int64_t* arguments, std::integer_sequence<int64_t, I...>) {
  reinterpret_cast<void (*)(decltype(I)...)>(function)(arguments[I]...);
}

template <int N>
static void call_any(const Call& call) {
  if (call.count == N) return call_with(call.function, call.arguments, std::make_integer_sequence<int64_t, N>());
  if constexpr (N > 0) call_any<N - 1>(call);
}

// Returns how many were made: fewer than `count` where one threw, which `message` (of `room` bytes) then tells.
extern "C" int64_t make_calls(const Call* calls, int64_t count, char* message, int64_t room) {
  int64_t made = 0;
  try {
    for (; made < count; ++made) call_any<MOST_ARGUMENTS>(calls[made]);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), room - 1);
  } catch (...) {
    std::strncpy(message, "an exception of no known type", room - 1);
  }
  return made;
}
