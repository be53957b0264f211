// Builds the tree of a template: statements. Expressions: jinja_expression.cpp.
#include "data/jinja_parser.h"

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {

const Token& Parser::advance() {
  const Token& token = tokens_[at_];
  if (token.kind != TokenKind::kEnd) ++at_;
  return token;
}

std::string Parser::describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kData:
      return "template data / text";
    case TokenKind::kVariableBegin:
      return "begin of print statement";
    case TokenKind::kVariableEnd:
      return "end of print statement";
    case TokenKind::kBlockBegin:
      return "begin of statement block";
    case TokenKind::kBlockEnd:
      return "end of statement block";
    case TokenKind::kString:
      return "string";
    case TokenKind::kNumber:
      return token.number.is(Kind::kFloat) ? "float" : "integer";
    case TokenKind::kEnd:
      return "end of template";
    default:
      return token.text;
  }
}

void Parser::expect(TokenKind kind, const char* name) {
  if (current().kind == kind) {
    advance();
  } else if (current().kind == TokenKind::kEnd) {
    error(std::string("unexpected end of template, expected '") + name + "'.");
  } else {
    error(std::string("expected token '") + name + "', got " + string_repr(describe(current())));
  }
}

void Parser::expect_operator(const char* op) {
  if (skip_operator(op)) return;
  if (current().kind == TokenKind::kEnd) error(std::string("unexpected end of template, expected '") + op + "'.");
  error(std::string("expected token '") + op + "', got " + string_repr(describe(current())));
}

std::string Parser::expect_name() {
  std::string name = current().text;
  expect(TokenKind::kName, "name");
  return name;
}

NodePtr Parser::finish(NodePtr node) {
  auto deepen = [&](const NodePtr& child) {
    if (child) node->depth = std::max(node->depth, child->depth + 1);
  };
  for (const NodePtr* child : {&node->a, &node->b, &node->c, &node->more_items, &node->more_named}) deepen(*child);
  for (const NodePtr& child : node->items) deepen(child);
  for (const auto& [name, child] : node->named) deepen(child);
  for (const Body& body : node->bodies)
    for (const NodePtr& child : body) deepen(child);
  if (node->depth > kMaxTreeDepth)
    error("the template is nested deeper than " + std::to_string(kMaxTreeDepth) + " levels");
  return node;
}

Parser::Nesting::Nesting(Parser& parser) : parser(parser) {
  if (++parser.nesting_ > kMaxParserNesting)
    parser.error("the template is nested deeper than " + std::to_string(kMaxParserNesting) + " levels");
}

// --- statements
// -------------------------------------------------------------------------------------------------------
void Parser::fail_unknown(const std::string* name) {
  std::string message = name ? "Encountered unknown tag " + string_repr(*name) + "." : "Unexpected end of template.";
  if (!end_tags_.empty()) {
    std::string wanted;
    bool elsewhere = false;
    for (const auto& tags : end_tags_)
      for (const std::string& tag : tags) elsewhere = elsewhere || (name && tag == *name);
    for (const std::string& tag : end_tags_.back()) wanted += (wanted.empty() ? "'" : " or '") + tag + "'";
    message += elsewhere
                   ? " You probably made a nesting mistake. Jinja is expecting this tag, but currently looking for " +
                         wanted + "."
                   : " Jinja was looking for the following tags: " + wanted + ".";
  }
  if (!open_tags_.empty())
    message += " The innermost block that needs to be closed is " + string_repr(open_tags_.back()) + ".";
  error(message);
}

Body Parser::parse_until(const std::vector<std::string>& end_tags) {
  Body body;
  if (!end_tags.empty()) end_tags_.push_back(end_tags);
  while (true) {
    const Token& token = current();
    if (token.kind == TokenKind::kEnd) {
      if (end_tags.empty()) return body;
      fail_unknown(nullptr);
    } else if (token.kind == TokenKind::kData) {
      auto node = std::make_unique<Node>(NodeKind::kText, token.line);
      node->text = advance().text;
      body.push_back(std::move(node));
    } else if (token.kind == TokenKind::kVariableBegin) {
      advance();
      auto node = std::make_unique<Node>(NodeKind::kPrint, token.line);
      node->a = parse_tuple();
      body.push_back(finish(std::move(node)));
      expect(TokenKind::kVariableEnd, "end of print statement");
    } else {
      advance();  // kBlockBegin
      for (const std::string& tag : end_tags) {
        if (is_name(tag.c_str())) {
          end_tags_.pop_back();
          return body;
        }
      }
      parse_statement(body);
      expect(TokenKind::kBlockEnd, "end of statement block");
    }
  }
}

Body Parser::parse_body(const std::vector<std::string>& end_tags) {
  skip_operator(":");
  expect(TokenKind::kBlockEnd, "end of statement block");
  return parse_until(end_tags);
}

void Parser::parse_statement(Body& body) {
  if (current().kind != TokenKind::kName) error("tag name expected");
  Nesting nesting(*this);
  std::string tag = current().text;
  open_tags_.push_back(tag);
  int line = current().line;
  NodePtr node;
  if (tag == "if")
    node = parse_if();
  else if (tag == "for")
    node = parse_for();
  else if (tag == "set")
    node = parse_set();
  else if (tag == "macro")
    node = parse_macro();
  else if (tag == "call")
    node = parse_call_block();
  else if (tag == "with")
    node = parse_with();
  else if (tag == "print") {
    advance();
    for (bool first = true; current().kind != TokenKind::kBlockEnd; first = false) {
      if (!first) expect_operator(",");
      auto print = std::make_unique<Node>(NodeKind::kPrint, line);
      print->a = parse_expression();
      body.push_back(finish(std::move(print)));
    }
  } else if (tag == "filter") {
    advance();
    node = std::make_unique<Node>(NodeKind::kFilterBlock, line);
    node->b = parse_filter(nullptr, true);
    node->bodies.push_back(parse_body({"endfilter"}));
    advance();
  } else if (tag == "generation") {
    advance();
    has_generation_ = true;
    node = std::make_unique<Node>(NodeKind::kGeneration, line);
    node->bodies.push_back(parse_function_body({"endgeneration"}, *node));
  } else if (tag == "block") {
    advance();
    node = std::make_unique<Node>(NodeKind::kBlock, line);
    node->text = expect_name();
    while (is_name("scoped") || is_name("required")) advance();
    node->bodies.push_back(parse_function_body({"endblock"}, *node));
    if (current().kind == TokenKind::kName && current().text == node->text) advance();
  } else if (tag == "break" || tag == "continue") {
    if (num_loops_ == 0) error("'" + tag + "' outside loop");
    advance();
    node = std::make_unique<Node>(tag == "break" ? NodeKind::kBreak : NodeKind::kContinue, line);
  } else if (tag == "include" || tag == "import" || tag == "from" || tag == "extends") {
    error("the tag '" + tag + "' reads other templates, which a chat template cannot do");
  } else if (tag == "autoescape") {
    error("the tag 'autoescape' is not supported");
  } else {
    open_tags_.pop_back();
    fail_unknown(&tag);
  }
  open_tags_.pop_back();
  if (node) body.push_back(finish(std::move(node)));
}

NodePtr Parser::parse_if() {
  auto node = std::make_unique<Node>(NodeKind::kIf, current().line);
  while (true) {
    advance();  // if, elif
    node->items.push_back(parse_tuple(false));
    ++num_conditions_;
    node->bodies.push_back(parse_body({"elif", "else", "endif"}));
    --num_conditions_;
    if (is_name("elif")) continue;
    if (is_name("else")) {
      advance();
      ++num_conditions_;
      node->bodies.push_back(parse_body({"endif"}));
      --num_conditions_;
    }
    advance();  // endif
    return node;
  }
}

NodePtr Parser::parse_for() {
  auto node = std::make_unique<Node>(NodeKind::kFor, current().line);
  advance();
  node->a = parse_target(false, "in");
  if (node->a->kind == NodeKind::kName && node->a->text == "loop")
    error("Can't assign to special loop variable in for-loop target");
  if (!skip_name("in")) error("expected token 'in', got " + string_repr(describe(current())));
  node->b = parse_tuple(false, "recursive");
  if (skip_name("if")) node->c = parse_expression();
  node->flag = skip_name("recursive");
  ++num_loops_;
  node->bodies.push_back(parse_body({"endfor", "else"}));
  --num_loops_;
  if (skip_name("else"))
    node->bodies.push_back(parse_body({"endfor"}));
  else
    node->bodies.emplace_back();
  advance();
  return node;
}

NodePtr Parser::parse_set() {
  int line = advance().line;
  NodePtr target = parse_target(true, nullptr);
  bool block = !skip_operator("=");
  auto node = std::make_unique<Node>(block ? NodeKind::kSetBlock : NodeKind::kSet, line);
  node->a = std::move(target);
  if (!block) {
    node->b = parse_tuple();
  } else {
    if (is_operator("|")) node->b = parse_filter(nullptr, false);
    node->bodies.push_back(parse_body({"endset"}));
    advance();
  }
  return node;
}

void Parser::parse_signature(Node& node) {
  expect_operator("(");
  for (bool first = true; !is_operator(")"); first = false) {
    if (!first) expect_operator(",");
    node.operators.push_back(expect_name());
    if (skip_operator("="))
      node.items.push_back(parse_expression());
    else if (!node.items.empty())
      error("non-default argument follows default argument");
  }
  expect_operator(")");
}

// The body of what Python sees as a function of its own: break and continue end at its border.
Body Parser::parse_function_body(const std::vector<std::string>& end_tags, Node& node) {
  int outer_loops = num_loops_;
  num_loops_ = 0;
  functions_.push_back(&node);
  Body body = parse_body(end_tags);
  functions_.pop_back();
  num_loops_ = outer_loops;
  advance();  // the end tag
  return body;
}

NodePtr Parser::parse_macro() {
  auto node = std::make_unique<Node>(NodeKind::kMacro, advance().line);
  node->text = expect_name();
  parse_signature(*node);
  node->bodies.push_back(parse_function_body({"endmacro"}, *node));
  return node;
}

NodePtr Parser::parse_call_block() {
  auto node = std::make_unique<Node>(NodeKind::kCallBlock, advance().line);
  if (is_operator("(")) parse_signature(*node);
  node->text = "caller";
  node->b = parse_expression();
  if (node->b->kind != NodeKind::kCall) error("expected call");
  node->bodies.push_back(parse_function_body({"endcall"}, *node));
  return node;
}

NodePtr Parser::parse_with() {
  auto node = std::make_unique<Node>(NodeKind::kWith, advance().line);
  while (current().kind != TokenKind::kBlockEnd) {
    if (!node->items.empty()) expect_operator(",");
    node->items.push_back(parse_target(false, nullptr));
    expect_operator("=");
    node->items.push_back(parse_expression());
  }
  node->bodies.push_back(parse_body({"endwith"}));
  advance();
  return node;
}

ParsedTemplate parse(const std::string& source) {
  Parser parser(tokenize(source));
  ParsedTemplate parsed;
  parsed.body = parser.parse_until({});
  parsed.has_generation = parser.has_generation();
  return parsed;
}

}  // namespace trireme::jinja
