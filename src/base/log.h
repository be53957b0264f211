// One line a message, on stderr, with the rank where it is not rank 0. stdout belongs to results.
#pragma once

#include <string>

namespace trireme {

enum class LogLevel { kInfo, kWarn, kError };

void set_log_rank(int rank, int size);        // told once by comm/process; for messages only
int log_rank();
void set_log_file(const std::string& path);   // every line that this rank prints also goes there, appended
void set_log_level(LogLevel level);

// Info of rank 0 only; warnings and errors of every rank.
void log_message(LogLevel level, const std::string& text);
// A line on a terminal that the next one, live or not, takes the place of. To the terminal alone.
void log_live(const std::string& text);
// To the file alone.
void log_quietly(const std::string& text);

inline void log_info(const std::string& text) { log_message(LogLevel::kInfo, text); }
inline void log_warn(const std::string& text) { log_message(LogLevel::kWarn, text); }

}  // namespace trireme
