// SPDX-License-Identifier: Apache-2.0
// Proves that the thread sanitizer understands OpenMP here: it must be quiet about this program, which is correct only thanks
// to the barriers and the reduction, and must report the race that -DPLANTED_RACE adds.
#include <cstdio>
#include <vector>

int main() {
  constexpr int size = 1000;
  std::vector<double> values(size, 1.0), sums(size);
  double total = 0, raced = 0;
#pragma omp parallel num_threads(4)
  {
#pragma omp for
    for (int i = 0; i < size; ++i) values[i] += i;
      // Reads what other threads wrote before the barrier that ends the loop above.
#pragma omp for schedule(dynamic, 7) reduction(+ : total)
    for (int i = 0; i < size; ++i) {
      sums[i] = values[size - 1 - i];
      total += sums[i];
#ifdef PLANTED_RACE
      raced += sums[i];
#endif
    }
  }
  std::printf("%g %g\n", total, raced);
  return total == 500500 ? 0 : 1;
}
