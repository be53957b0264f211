// A recursive-descent parser with jinja2's grammar and words.
#pragma once

#include <string>
#include <vector>

#include "data/jinja_node.h"

namespace trireme::jinja {

constexpr int kMaxTreeDepth = 300;  // of nodes below each other
constexpr int kMaxParserNesting =
    100;  // of brackets and blocks; Python refuses 100 nested blocks and 200 brackets, too

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Body parse_until(const std::vector<std::string>& end_tags);  // the tag itself is left; none: up to the end
  bool has_generation() const { return has_generation_; }

 private:
  struct Nesting {
    explicit Nesting(Parser& parser);
    ~Nesting() { --parser.nesting_; }
    Parser& parser;
  };

  [[noreturn]] void error(const std::string& message) const { throw TemplateError{message, current().line}; }
  [[noreturn]] void fail_unknown(const std::string* name);
  const Token& current() const { return tokens_[at_]; }
  const Token& look_ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  const Token& advance();
  static std::string describe(const Token& token);
  bool is_name(const char* name) const { return current().kind == TokenKind::kName && current().text == name; }
  bool is_operator(const char* op) const { return current().kind == TokenKind::kOperator && current().text == op; }
  bool skip_name(const char* name) { return is_name(name) && (advance(), true); }
  bool skip_operator(const char* op) { return is_operator(op) && (advance(), true); }
  void expect(TokenKind kind, const char* name);
  void expect_operator(const char* op);
  std::string expect_name();
  NodePtr finish(NodePtr node);  // sets and checks its depth
  NodePtr make(NodeKind kind) const { return std::make_unique<Node>(kind, current().line); }

  Body parse_body(const std::vector<std::string>& end_tags);
  Body parse_function_body(const std::vector<std::string>& end_tags, Node& node);
  void parse_statement(Body& body);
  NodePtr parse_if();
  NodePtr parse_for();
  NodePtr parse_set();
  NodePtr parse_macro();
  NodePtr parse_call_block();
  NodePtr parse_with();
  void parse_signature(Node& node);

  NodePtr parse_target(bool with_namespace, const char* end_name);
  NodePtr parse_tuple(bool with_conditional = true, const char* end_name = nullptr, bool in_parentheses = false,
                      bool target = false, bool with_namespace = false);
  NodePtr parse_expression(bool with_conditional = true);
  NodePtr parse_or();
  NodePtr parse_and();
  NodePtr parse_not();
  NodePtr parse_compare();
  NodePtr parse_sum();
  NodePtr parse_concat();
  NodePtr parse_product();
  NodePtr parse_power();
  NodePtr parse_unary(bool with_filter = true);
  NodePtr parse_primary(bool with_namespace = false);
  NodePtr parse_list();
  NodePtr parse_dict();
  NodePtr parse_postfix(NodePtr node);
  NodePtr parse_subscript(NodePtr node);
  NodePtr parse_subscribed();
  NodePtr parse_call(NodePtr node);
  NodePtr parse_filter(NodePtr node, bool inline_start);
  NodePtr parse_test(NodePtr node);
  void parse_arguments(Node& node);
  void note_name(const std::string& name);

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0, num_loops_ = 0, num_conditions_ = 0;
  bool has_generation_ = false;
  std::vector<std::string> open_tags_;
  std::vector<std::vector<std::string>> end_tags_;
  std::vector<Node*> functions_;  // macros and call blocks around this place
};

}  // namespace trireme::jinja
