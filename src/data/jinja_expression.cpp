// Builds the tree of an expression.
#include "data/jinja_parser.h"
#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {

NodePtr Parser::parse_target(bool with_namespace, const char* end_name) {
  NodePtr target = parse_tuple(true, end_name, false, true, with_namespace);
  auto check = [&](const Node& node) {
    static const char* const kTypes[] = {"const", "name", "nsref", "tuple", "list", "dict"};
    if (node.kind != NodeKind::kName && node.kind != NodeKind::kNamespaceRef)
      error(std::string("can't assign to '") +
            (node.kind <= NodeKind::kDict ? kTypes[static_cast<int>(node.kind)] : "expression") + "'");
  };
  if (target->kind != NodeKind::kTuple) {
    check(*target);
    return target;
  }
  std::vector<const Node*> open{target.get()};
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    for (const NodePtr& item : node->items) {
      if (item->kind == NodeKind::kTuple)
        open.push_back(item.get());
      else
        check(*item);
    }
  }
  return target;
}

NodePtr Parser::parse_tuple(bool with_conditional, const char* end_name, bool in_parentheses, bool target,
                            bool with_namespace) {
  NodePtr tuple = make(NodeKind::kTuple);
  bool is_tuple = false;
  while (true) {
    if (!tuple->items.empty()) expect_operator(",");
    if (current().kind == TokenKind::kVariableEnd || current().kind == TokenKind::kBlockEnd || is_operator(")") ||
        (end_name && is_name(end_name)))
      break;
    tuple->items.push_back(target ? parse_primary(with_namespace) : parse_expression(with_conditional));
    if (!is_operator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple && !tuple->items.empty()) return std::move(tuple->items[0]);
  if (!is_tuple && !in_parentheses) error("Expected an expression, got " + string_repr(describe(current())));
  return finish(std::move(tuple));
}

NodePtr Parser::parse_expression(bool with_conditional) {
  Nesting nesting(*this);
  NodePtr left = parse_or();
  while (with_conditional && is_name("if")) {
    NodePtr node = make(NodeKind::kConditional);
    advance();
    node->a = std::move(left);
    node->b = parse_or();
    if (skip_name("else")) node->c = parse_expression();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_or() {
  NodePtr left = parse_and();
  while (is_name("or")) {
    NodePtr node = make(NodeKind::kOr);
    advance();
    node->a = std::move(left);
    node->b = parse_and();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_and() {
  NodePtr left = parse_not();
  while (is_name("and")) {
    NodePtr node = make(NodeKind::kAnd);
    advance();
    node->a = std::move(left);
    node->b = parse_not();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_not() {
  if (!is_name("not")) return parse_compare();
  Nesting nesting(*this);
  NodePtr node = make(NodeKind::kNot);
  advance();
  node->a = parse_not();
  return finish(std::move(node));
}

NodePtr Parser::parse_compare() {
  NodePtr first = parse_sum();
  NodePtr node = make(NodeKind::kCompare);
  while (true) {
    std::string op = current().kind == TokenKind::kOperator ? current().text : "";
    if (op == "==" || op == "!=" || op == "<" || op == "<=" || op == ">" || op == ">=") {
      advance();
    } else if (is_name("in")) {
      advance();
      op = "in";
    } else if (is_name("not") && look_ahead().kind == TokenKind::kName && look_ahead().text == "in") {
      advance();
      advance();
      op = "not in";
    } else {
      break;
    }
    node->operators.push_back(op);
    node->items.push_back(parse_sum());
  }
  if (node->items.empty()) return first;
  node->a = std::move(first);
  return finish(std::move(node));
}

NodePtr Parser::parse_sum() {
  NodePtr left = parse_concat();
  while (is_operator("+") || is_operator("-")) {
    NodePtr node = make(NodeKind::kBinary);
    node->text = advance().text;
    node->a = std::move(left);
    node->b = parse_concat();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_concat() {
  NodePtr first = parse_product();
  if (!is_operator("~")) return first;
  NodePtr node = make(NodeKind::kConcat);
  node->items.push_back(std::move(first));
  while (skip_operator("~")) node->items.push_back(parse_product());
  return finish(std::move(node));
}

NodePtr Parser::parse_product() {
  NodePtr left = parse_power();
  while (is_operator("*") || is_operator("/") || is_operator("//") || is_operator("%")) {
    NodePtr node = make(NodeKind::kBinary);
    node->text = advance().text;
    node->a = std::move(left);
    node->b = parse_power();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_power() {
  NodePtr left = parse_unary();
  while (is_operator("**")) {
    NodePtr node = make(NodeKind::kBinary);
    node->text = advance().text;
    node->a = std::move(left);
    node->b = parse_unary();
    left = finish(std::move(node));
  }
  return left;
}

NodePtr Parser::parse_unary(bool with_filter) {
  NodePtr node;
  if (is_operator("-") || is_operator("+")) {
    Nesting nesting(*this);
    node = make(is_operator("-") ? NodeKind::kNegative : NodeKind::kPositive);
    advance();
    node->a = parse_unary(false);
    node = finish(std::move(node));
  } else {
    node = parse_primary();
  }
  node = parse_postfix(std::move(node));
  while (with_filter) {
    if (is_operator("|"))
      node = parse_filter(std::move(node), false);
    else if (is_name("is"))
      node = parse_test(std::move(node));
    else if (is_operator("("))
      node = parse_call(std::move(node));
    else
      break;
  }
  return node;
}

// `caller`, `kwargs` and `varargs` are parameters of the macros whose bodies name them.
void Parser::note_name(const std::string& name) {
  for (Node* function : functions_) {
    if (name == "caller") function->uses_caller = true;
    if (name == "kwargs") function->uses_kwargs = true;
    if (name == "varargs") function->uses_varargs = true;
  }
}

NodePtr Parser::parse_primary(bool with_namespace) {
  NodePtr node = make(NodeKind::kConst);
  const Token& token = current();
  if (token.kind == TokenKind::kName) {
    const std::string& name = advance().text;
    if (name == "true" || name == "True") {
      node->value = Value::boolean(true);
    } else if (name == "false" || name == "False") {
      node->value = Value::boolean(false);
    } else if (name != "none" && name != "None") {
      node->kind = NodeKind::kName;
      node->text = name;
      note_name(name);
      if (with_namespace && skip_operator(".")) {
        node->kind = NodeKind::kNamespaceRef;
        node->attribute = expect_name();
      }
    }
  } else if (token.kind == TokenKind::kString) {
    std::string text;
    while (current().kind == TokenKind::kString) text += advance().text;
    node->value = Value::string(text);
  } else if (token.kind == TokenKind::kNumber) {
    node->value = advance().number;
  } else if (is_operator("(")) {
    Nesting nesting(*this);
    advance();
    node = parse_tuple(true, nullptr, true);
    expect_operator(")");
  } else if (is_operator("[")) {
    node = parse_list();
  } else if (is_operator("{")) {
    node = parse_dict();
  } else {
    error("unexpected " + string_repr(describe(token)));
  }
  return node;
}

NodePtr Parser::parse_list() {
  NodePtr node = make(NodeKind::kList);
  advance();
  while (!is_operator("]")) {
    if (!node->items.empty()) expect_operator(",");
    if (is_operator("]")) break;
    node->items.push_back(parse_expression());
  }
  expect_operator("]");
  return finish(std::move(node));
}

NodePtr Parser::parse_dict() {
  NodePtr node = make(NodeKind::kDict);
  advance();
  while (!is_operator("}")) {
    if (!node->items.empty()) expect_operator(",");
    if (is_operator("}")) break;
    node->items.push_back(parse_expression());
    expect_operator(":");
    node->items.push_back(parse_expression());
  }
  expect_operator("}");
  return finish(std::move(node));
}

NodePtr Parser::parse_postfix(NodePtr node) {
  while (true) {
    if (is_operator(".") || is_operator("["))
      node = parse_subscript(std::move(node));
    else if (is_operator("("))
      node = parse_call(std::move(node));
    else
      return node;
  }
}

NodePtr Parser::parse_subscript(NodePtr object) {
  NodePtr node = make(NodeKind::kGetitem);
  if (skip_operator(".")) {
    if (current().kind == TokenKind::kName) {
      node->kind = NodeKind::kGetattr;
      node->text = advance().text;
    } else if (current().kind == TokenKind::kNumber && current().number.is(Kind::kInt)) {
      node->b = make(NodeKind::kConst);
      node->b->value = advance().number;
    } else {
      error("expected name or number");
    }
  } else {
    advance();
    NodePtr tuple = make(NodeKind::kTuple);
    while (!is_operator("]")) {
      if (!tuple->items.empty()) expect_operator(",");
      tuple->items.push_back(parse_subscribed());
    }
    expect_operator("]");
    node->b = tuple->items.size() == 1 ? std::move(tuple->items[0]) : finish(std::move(tuple));
  }
  node->a = std::move(object);
  return finish(std::move(node));
}

NodePtr Parser::parse_subscribed() {
  NodePtr slice = make(NodeKind::kSlice);
  NodePtr start;
  if (!is_operator(":")) {
    start = parse_expression();
    if (!is_operator(":")) return start;
  }
  advance();
  slice->items.push_back(std::move(start));
  bool ends = is_operator(":") || is_operator("]") || is_operator(",");
  slice->items.push_back(ends ? nullptr : parse_expression());
  NodePtr step;
  if (skip_operator(":") && !is_operator("]") && !is_operator(",")) step = parse_expression();
  slice->items.push_back(std::move(step));
  return finish(std::move(slice));
}

void Parser::parse_arguments(Node& node) {
  expect_operator("(");
  auto ensure = [&](bool valid) {
    if (!valid) error("invalid syntax for function call expression");
  };
  for (bool first = true; !is_operator(")"); first = false) {
    if (!first) {
      expect_operator(",");
      if (is_operator(")")) break;
    }
    if (is_operator("*")) {
      ensure(!node.more_items && !node.more_named);
      advance();
      node.more_items = parse_expression();
    } else if (is_operator("**")) {
      ensure(!node.more_named);
      advance();
      node.more_named = parse_expression();
    } else if (current().kind == TokenKind::kName && look_ahead().kind == TokenKind::kOperator &&
               look_ahead().text == "=") {
      ensure(!node.more_named);
      std::string name = advance().text;
      advance();
      for (const auto& [other, unused] : node.named)
        if (other == name) error("keyword argument repeated: " + name);
      node.named.emplace_back(name, parse_expression());
    } else {
      ensure(!node.more_items && !node.more_named && node.named.empty());
      node.items.push_back(parse_expression());
    }
  }
  expect_operator(")");
}

NodePtr Parser::parse_call(NodePtr function) {
  NodePtr node = make(NodeKind::kCall);
  node->a = std::move(function);
  parse_arguments(*node);
  return finish(std::move(node));
}

NodePtr Parser::parse_filter(NodePtr value, bool inline_start) {
  while (is_operator("|") || inline_start) {
    if (!inline_start) advance();
    inline_start = false;
    NodePtr node = make(NodeKind::kFilter);
    node->text = expect_name();
    while (skip_operator(".")) node->text += "." + expect_name();
    if (num_conditions_ == 0 && !Runtime::has_filter(node->text))
      error("No filter named " + string_repr(node->text) + ".");
    if (is_operator("(")) parse_arguments(*node);
    node->a = std::move(value);
    value = finish(std::move(node));
  }
  return value;
}

NodePtr Parser::parse_test(NodePtr value) {
  Nesting nesting(*this);
  NodePtr node = make(NodeKind::kTest);
  advance();  // is
  bool negated = skip_name("not");
  node->text = expect_name();
  while (skip_operator(".")) node->text += "." + expect_name();
  if (num_conditions_ == 0 && !Runtime::has_test(node->text)) error("No test named " + string_repr(node->text) + ".");
  TokenKind kind = current().kind;
  if (is_operator("(")) {
    parse_arguments(*node);
  } else if ((kind == TokenKind::kName || kind == TokenKind::kString || kind == TokenKind::kNumber ||
              is_operator("[") || is_operator("{")) &&
             !is_name("else") && !is_name("or") && !is_name("and")) {
    if (is_name("is")) error("You cannot chain multiple tests with is");
    node->items.push_back(parse_postfix(parse_primary()));
  }
  node->a = std::move(value);
  node = finish(std::move(node));
  if (!negated) return node;
  NodePtr inverse = make(NodeKind::kNot);
  inverse->a = std::move(node);
  return finish(std::move(inverse));
}

}  // namespace trireme::jinja
