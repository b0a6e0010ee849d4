// Evidence of neighbours: nearest entities, votes, shared facts, and sums of terms. Wrappers are in evidence.py.
//
// Every function gives the bits of its twin in mocme_dist/evidence: sums are taken in the same order, and products of
// whole numbers are exact. Queries are shared out among threads; none depends on another.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int ID_BITS = 37;  // as in units.py
constexpr int64_t ID_MASK = (int64_t{1} << ID_BITS) - 1;
constexpr int64_t NOBODY = std::numeric_limits<int64_t>::min();
constexpr double TWICE_SQUARE_OF_SCALE = 8e6;
constexpr int64_t CANDIDATES = 256;  // of one block, whose units stay in the second cache
constexpr int64_t TOGETHER = 32;     // queries that pass over a block
constexpr int DOTS = 4;              // queries that share the load of a candidate

inline int64_t to_key(int64_t closeness, int64_t id) { return closeness * (ID_MASK + 1) + (ID_MASK - id); }

// The largest keys of one query: a heap whose first is the smallest that is kept.
struct Best {
    std::vector<int64_t> keys;
    size_t count;
    explicit Best(int64_t k) : count(static_cast<size_t>(k)) { keys.reserve(count); }
    bool takes(int64_t key) const { return keys.size() < count || key > keys.front(); }
    // Closeness below which no candidate is taken, whatever its id.
    int64_t bar() const { return keys.size() < count ? std::numeric_limits<int64_t>::min() : keys.front() >> ID_BITS; }
    void put(int64_t key) {
        if (keys.size() == count) {
            std::pop_heap(keys.begin(), keys.end(), std::greater<int64_t>());
            keys.back() = key;
        } else {
            keys.push_back(key);
        }
        std::push_heap(keys.begin(), keys.end(), std::greater<int64_t>());
    }
    void write(int64_t* out) {
        std::sort(keys.begin(), keys.end(), std::greater<int64_t>());
        std::copy(keys.begin(), keys.end(), out);
        std::fill(out + keys.size(), out + count, NOBODY);
        keys.clear();
    }
};

// Products of whole numbers; their sums stay below 2^24.
inline int32_t dot(const int16_t* a, const int16_t* b, int64_t F) {
    int32_t sum = 0;
    for (int64_t i = 0; i < F; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
    return sum;
}

inline void dots(const int16_t* const* query, const int16_t* row, int64_t F, int32_t* out) {
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const int16_t *q0 = query[0], *q1 = query[1], *q2 = query[2], *q3 = query[3];
    for (int64_t i = 0; i < F; ++i) {
        const int32_t x = row[i];
        s0 += x * q0[i];
        s1 += x * q1[i];
        s2 += x * q2[i];
        s3 += x * q3[i];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// The table of known answers (data/known.py) with the first key of each entity, and this rank's rows.
struct Facts {
    const int64_t *keys, *offsets, *targets, *first_key_E;
    int64_t places, first, rows;
    // Position of a query's key, -1 without one. A search among the entity's own keys waits for memory once or twice.
    int64_t at(int64_t source, int64_t place) const {
        const int64_t *begin = keys + first_key_E[source], *end = keys + first_key_E[source + 1];
        const int64_t key = source * places + place, *found = std::lower_bound(begin, end, key);
        return found != end && *found == key ? found - keys : -1;
    }
    // Where the answers of a query begin and end.
    void span(int64_t source, int64_t place, int64_t* begin, int64_t* end) const {
        const int64_t i = at(source, place);
        *begin = i < 0 ? 0 : offsets[i];
        *end = i < 0 ? 0 : offsets[i + 1];
    }
    bool has(int64_t source, int64_t place) const { return at(source, place) >= 0; }
};

// Sums of one query, by row: numbers for all rows, and a mark for each that has one.
struct Sums {
    std::vector<double> sum_r;
    std::vector<uint64_t> marks;
    explicit Sums(int64_t rows) : sum_r(static_cast<size_t>(rows)), marks(static_cast<size_t>(rows + 63) / 64) {}
    // Adds a weight to the rows of the entities targets[begin, end).
    void add(const Facts& facts, int64_t begin, int64_t end, double weight) {
        for (int64_t i = begin; i < end; ++i) {
            const uint64_t row = static_cast<uint64_t>(facts.targets[i] - facts.first);
            if (row >= static_cast<uint64_t>(facts.rows)) continue;
            sum_r[row] += weight;
            marks[row >> 6] |= uint64_t{1} << (row & 63);
        }
    }
    // Calls give(row, sum) for each row with a sum above 0, ascending, and forgets them all.
    template <typename F>
    void drain(F give) {
        for (size_t word = 0; word < marks.size(); ++word) {
            for (uint64_t bits = marks[word]; bits; bits &= bits - 1) {
                const size_t row = word * 64 + static_cast<size_t>(__builtin_ctzll(bits));
                if (sum_r[row] > 0) give(static_cast<int64_t>(row), sum_r[row]);
                sum_r[row] = 0;
            }
            marks[word] = 0;
        }
    }
};

// Values of some rows of each query, in pieces by thread until they are taken.
struct Found {
    std::vector<std::vector<int32_t>> rows;
    std::vector<std::vector<double>> values;
    std::vector<int32_t> thread_U;
    std::vector<size_t> begin_U, length_U;
    Found(int64_t U, int32_t threads)
        : rows(static_cast<size_t>(threads)), values(static_cast<size_t>(threads)), thread_U(static_cast<size_t>(U)),
          begin_U(static_cast<size_t>(U)), length_U(static_cast<size_t>(U)) {}
};

inline int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Runs fill(u, sums, give) for each query; give(row, value) adds a value to what was found for it.
template <typename Fill>
Found* find_all(int64_t U, const Facts& facts, int32_t threads, int64_t* offsets_U, Fill fill) {
    auto* found = new Found(U, threads);
#pragma omp parallel num_threads(threads)
    {
        const int thread = this_thread();
        auto &rows = found->rows[static_cast<size_t>(thread)];
        auto &values = found->values[static_cast<size_t>(thread)];
        Sums sums(facts.rows);
#pragma omp for schedule(dynamic, 16)
        for (int64_t u = 0; u < U; ++u) {
            const size_t at = static_cast<size_t>(u);
            found->thread_U[at] = thread;
            found->begin_U[at] = rows.size();
            fill(u, sums, [&](int64_t row, double value) {
                rows.push_back(static_cast<int32_t>(row));
                values.push_back(value);
            });
            found->length_U[at] = rows.size() - found->begin_U[at];
        }
    }
    offsets_U[0] = 0;
    for (int64_t u = 0; u < U; ++u)
        offsets_U[u + 1] = offsets_U[u] + static_cast<int64_t>(found->length_U[static_cast<size_t>(u)]);
    return found;
}

// A column of the space of shared facts: a fact (place, neighbour), the entities that hold it, and its weight.
struct Column {
    int64_t place, neighbour, begin, end;
    double weight;
};

// Calls give(column) for each column of an entity, `weight` its idf, and returns the length of the entity's vector.
template <typename F>
double each_column(const Facts& facts, const double* idf_h, int64_t max_holders, int64_t id, F give) {
    double square = 0;
    for (int64_t i = facts.first_key_E[id]; i < facts.first_key_E[id + 1]; ++i) {
        const int64_t place = facts.keys[i] - id * facts.places;
        for (int64_t j = facts.offsets[i]; j < facts.offsets[i + 1]; ++j) {
            Column column{place, facts.targets[j], 0, 0, 0};
            facts.span(column.neighbour, place ^ 1, &column.begin, &column.end);
            const int64_t holders = column.end - column.begin;
            if (holders > max_holders) continue;
            column.weight = idf_h[holders];
            square += column.weight * column.weight;
            give(column);
        }
    }
    return std::sqrt(square);
}

// Terms that have values at some candidates only: entries [offsets[i], offsets[i + 1]) of query i, rows ascending.
struct Sparse {
    const int64_t* offsets;
    const int32_t* row;
    const float* value;
    const int64_t* index_Q;  // which i each query has
};

Sparse sparse_term(const int64_t* addresses, int64_t term) {
    const int64_t* four = addresses + 4 * term;
    return {reinterpret_cast<const int64_t*>(four[0]), reinterpret_cast<const int32_t*>(four[1]),
            reinterpret_cast<const float*>(four[2]), reinterpret_cast<const int64_t*>(four[3])};
}

}  // namespace

extern "C" {

// keys_Uk (U, k): the nearest of the rows candidate[groups[g], groups[g + 1]) of each query of group g, which are
// [queries[g], queries[g + 1]), the source itself left out. unit_UF, unit_rF: whole numbers.
void mocme_nearest(const int16_t* unit_UF, const int16_t* unit_rF, const int64_t* source_U, const int64_t* queries,
                   const int64_t* groups, const int64_t* candidate, int64_t* keys_Uk, int64_t num_groups, int64_t F,
                   int64_t k, int64_t first, int32_t threads) {
    struct Task {
        int64_t group, begin, end;
    };
    std::vector<Task> tasks;
    for (int64_t g = 0; g < num_groups; ++g)
        for (int64_t u = queries[g]; u < queries[g + 1]; u += TOGETHER)
            tasks.push_back({g, u, std::min(u + TOGETHER, queries[g + 1])});
#pragma omp parallel num_threads(threads)
    {
        std::vector<Best> best(TOGETHER, Best(k));
        std::vector<int32_t> square(TOGETHER), square_c(CANDIDATES);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); ++t) {
            const Task task = tasks[t];
            const int64_t size = task.end - task.begin;
            for (int64_t i = 0; i < size; ++i) {
                const int16_t* unit = unit_UF + (task.begin + i) * F;
                square[static_cast<size_t>(i)] = dot(unit, unit, F);
            }
            for (int64_t low = groups[task.group]; low < groups[task.group + 1]; low += CANDIDATES) {
                const int64_t high = std::min(low + CANDIDATES, groups[task.group + 1]);
                for (int64_t c = low; c < high; ++c) {
                    const int16_t* unit = unit_rF + candidate[c] * F;
                    square_c[static_cast<size_t>(c - low)] = dot(unit, unit, F);
                }
                for (int64_t i = 0; i < size; i += DOTS) {
                    const int16_t* query[DOTS];
                    for (int d = 0; d < DOTS; ++d)
                        query[d] = unit_UF + (task.begin + std::min(i + d, size - 1)) * F;
                    const int64_t together = std::min<int64_t>(DOTS, size - i);
                    for (int64_t c = low; c < high; ++c) {
                        const int64_t row = candidate[c];
                        int32_t product[DOTS];
                        if (together == 1)
                            product[0] = dot(query[0], unit_rF + row * F, F);
                        else
                            dots(query, unit_rF + row * F, F, product);
                        for (int64_t d = 0; d < together; ++d) {
                            const size_t at = static_cast<size_t>(i + d);
                            const int64_t closeness =
                                2 * int64_t{product[d]} - square[at] - square_c[static_cast<size_t>(c - low)];
                            if (closeness < best[at].bar()) continue;
                            const int64_t key = to_key(closeness, row + first);
                            if (best[at].takes(key) && row + first != source_U[task.begin + i + d]) best[at].put(key);
                        }
                    }
                }
            }
            for (int64_t i = 0; i < size; ++i) best[static_cast<size_t>(i)].write(keys_Uk + (task.begin + i) * k);
        }
    }
}

// handle[0]: sums of the weights (U, k) of each query's neighbours (U, k) over their answers at the query's place.
void mocme_votes(const int64_t* keys, const int64_t* offsets, const int64_t* targets,
                 const int64_t* first_key_E, const int64_t* place_U,
                 const int64_t* ids_Uk, const double* weight_Uk, int64_t* offsets_U, int64_t* handle, int64_t places,
                 int64_t first, int64_t rows, int64_t U, int64_t k, int32_t threads) {
    const Facts facts{keys, offsets, targets, first_key_E, places, first, rows};
    auto* found = find_all(U, facts, threads, offsets_U, [&](int64_t u, Sums& sums, auto give) {
        for (int64_t i = u * k; i < (u + 1) * k; ++i) {
            int64_t begin, end;
            if (!(weight_Uk[i] > 0)) continue;
            facts.span(ids_Uk[i], place_U[u], &begin, &end);
            sums.add(facts, begin, end, weight_Uk[i]);
        }
        sums.drain(give);
    });
    handle[0] = reinterpret_cast<int64_t>(found);
}

// keys_Uk (U, k): the entities nearest to each source by shared facts, among those that have a fact at its place.
void mocme_shared_nearest(const int64_t* keys, const int64_t* offsets, const int64_t* targets,
                          const int64_t* first_key_E, const double* idf_h,
                          const double* length_r, const int64_t* source_U, const int64_t* place_U, int64_t* keys_Uk,
                          int64_t places, int64_t first, int64_t rows, int64_t max_holders, int64_t U,
                          int64_t k, int32_t threads) {
    const Facts facts{keys, offsets, targets, first_key_E, places, first, rows};
#pragma omp parallel num_threads(threads)
    {
        Sums sums(rows);
        Best best(k);
#pragma omp for schedule(dynamic, 16)
        for (int64_t u = 0; u < U; ++u) {
            const int64_t source = source_U[u];
            const double length = each_column(facts, idf_h, max_holders, source, [&](const Column& column) {
                if (column.weight > 0) sums.add(facts, column.begin, column.end, column.weight * column.weight);
            });
            sums.drain([&](int64_t row, double sum) {
                const double cosine = std::min(sum / (length * length_r[row]), 1.0);
                const auto closeness = static_cast<int64_t>(std::nearbyint((cosine - 1.0) * TWICE_SQUARE_OF_SCALE));
                const int64_t key = to_key(closeness, row + first);
                if (best.takes(key) && row + first != source && facts.has(row + first, place_U[u])) best.put(key);
            });
            best.write(keys_Uk + u * k);
        }
    }
}

// handle[0]: cosines to the mean of the first `max_answers` known answers of each query, without the column that makes
// them answers.
void mocme_shared_likeness(const int64_t* keys, const int64_t* offsets, const int64_t* targets,
                           const int64_t* first_key_E, const double* idf_h,
                           const double* length_r, const int64_t* source_U, const int64_t* place_U, int64_t* offsets_U,
                           int64_t* handle, int64_t places, int64_t first, int64_t rows,
                           int64_t max_holders, int64_t max_answers, int64_t U, int32_t threads) {
    const Facts facts{keys, offsets, targets, first_key_E, places, first, rows};
    auto* found = find_all(U, facts, threads, offsets_U, [&](int64_t u, Sums& sums, auto give) {
        int64_t begin, end;
        facts.span(source_U[u], place_U[u], &begin, &end);
        std::vector<Column> columns;
        for (int64_t i = begin; i < std::min(end, begin + max_answers); ++i) {
            const size_t before = columns.size();
            const double length = each_column(facts, idf_h, max_holders, targets[i], [&](const Column& column) {
                if (column.place != (place_U[u] ^ 1) || column.neighbour != source_U[u]) columns.push_back(column);
            });
            for (size_t c = before; c < columns.size(); ++c) columns[c].weight /= length > 0 ? length : 1.0;
        }
        std::stable_sort(columns.begin(), columns.end(), [](const Column& a, const Column& b) {
            return a.place != b.place ? a.place < b.place : a.neighbour < b.neighbour;
        });
        double square = 0;
        for (size_t c = 0; c < columns.size();) {
            const Column& column = columns[c];
            double weight = 0;
            const auto same = [&](const Column& other) {
                return other.place == column.place && other.neighbour == column.neighbour;
            };
            for (; c < columns.size() && same(columns[c]); ++c) weight += columns[c].weight;
            square += weight * weight;
            const double idf = idf_h[column.end - column.begin];
            if (weight * idf > 0) sums.add(facts, column.begin, column.end, weight * idf);
        }
        const double size = std::sqrt(square);
        sums.drain([&](int64_t row, double sum) { give(row, sum / (size * length_r[row])); });
    });
    handle[0] = reinterpret_cast<int64_t>(found);
}

// Moves what a handle holds to row and value, query by query, and ends the handle.
void mocme_take(int32_t* row, double* value, int64_t handle, int32_t) {
    const auto* found = reinterpret_cast<Found*>(handle);
    size_t to = 0;
    for (size_t u = 0; u < found->length_U.size(); ++u) {
        const size_t thread = static_cast<size_t>(found->thread_U[u]), length = found->length_U[u];
        std::copy_n(found->rows[thread].begin() + static_cast<int64_t>(found->begin_U[u]), length, row + to);
        std::copy_n(found->values[thread].begin() + static_cast<int64_t>(found->begin_U[u]), length, value + to);
        to += length;
    }
    delete found;
}

// out_Qn (Q, n): sums of T sparse terms times weight_QT for the rows [low, low + n), term by term.
// addresses (T, 4): see `sparse_term`.
void mocme_sparse_bias(const int64_t* addresses, const float* weight_QT, float* out_Qn, int64_t T, int64_t Q, int64_t n,
                       int64_t low, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int64_t q = 0; q < Q; ++q) {
        float* out_n = out_Qn + q * n;
        std::fill_n(out_n, n, 0.0f);
        for (int64_t t = 0; t < T; ++t) {
            const float weight = weight_QT[q * T + t];
            if (weight == 0) continue;
            const Sparse term = sparse_term(addresses, t);
            int64_t e = term.offsets[term.index_Q[q]];
            const int64_t end = term.offsets[term.index_Q[q] + 1];
            if (low > 0) e = std::lower_bound(term.row + e, term.row + end, static_cast<int32_t>(low)) - term.row;
            for (; e < end && term.row[e] < low + n; ++e) out_n[term.row[e] - low] += weight * term.value[e];
        }
    }
}

// out_Qn (Q, n): adds product_pn times factor_p to the rows query_p, which are distinct.
void mocme_add_products(const float* product_pn, const float* factor_p, const int64_t* query_p, float* out_Qn,
                        int64_t P, int64_t n, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < P; ++p) {
        const float* product_n = product_pn + p * n;
        float* out_n = out_Qn + query_p[p] * n;
        for (int64_t i = 0; i < n; ++i) out_n[i] += product_n[i] * factor_p[p];
    }
}

// out_P: adds, for pairs of a query and a row, the sparse terms; the same bits as mocme_sparse_bias.
void mocme_sparse_pairs(const int64_t* addresses, const float* weight_PT, const int32_t* row_P, float* out_P, int64_t T,
                        int64_t P, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < P; ++p)
        for (int64_t t = 0; t < T; ++t) {
            const float weight = weight_PT[p * T + t];
            if (weight == 0) continue;
            const Sparse term = sparse_term(addresses, t);
            const int32_t* begin = term.row + term.offsets[term.index_Q[p]];
            const int32_t* end = term.row + term.offsets[term.index_Q[p] + 1];
            const int32_t* at = std::lower_bound(begin, end, row_P[p]);
            if (at != end && *at == row_P[p]) out_P[p] += weight * term.value[at - term.row];
        }
}

}  // extern "C"
