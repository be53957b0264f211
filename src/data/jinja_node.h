// Tokens and the tree of a template.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/jinja_value.h"

namespace trireme::jinja {

enum class TokenKind : uint8_t {
  kData,
  kVariableBegin,
  kVariableEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kNumber,
  kOperator,
  kEnd
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;  // data, name, string, or operator
  Value number;      // kNumber
};

// DataError-free: throws TemplateError with the line.
std::vector<Token> tokenize(const std::string& source);

enum class NodeKind : uint8_t {
  // expressions
  kConst,
  kName,
  kNamespaceRef,
  kTuple,
  kList,
  kDict,
  kGetattr,
  kGetitem,
  kSlice,
  kCall,
  kFilter,
  kTest,
  kNot,
  kNegative,
  kPositive,
  kBinary,
  kConcat,
  kCompare,
  kAnd,
  kOr,
  kConditional,
  // statements
  kText,
  kPrint,
  kIf,
  kFor,
  kSet,
  kSetBlock,
  kMacro,
  kCallBlock,
  kFilterBlock,
  kWith,
  kGeneration,
  kBlock,
  kBreak,
  kContinue
};

struct Node;
using NodePtr = std::unique_ptr<Node>;
using Body = std::vector<NodePtr>;

// One type for all kinds; what a field holds:
//   kName, kGetattr, kFilter, kTest, kMacro, kText, kBinary   text: the name, text or operator
//   kNamespaceRef          text "." attribute
//   kTuple, kList          items;  kDict: key, value, key, value, ...
//   kCall, kFilter, kTest  a: what is called or filtered (null in filter blocks), items, named, more_items (*),
//   more_named (**) kSlice                 a[b : c : d] as items (null where absent);  kGetitem: a, b kCompare a, then
//   operators with items;  kConditional: a if b else c (null) kIf                    items: tests, bodies: one each,
//   and one more for else kFor                   a: target, b: iterable, c: test; bodies: {body, else}; flag: recursive
//   kSet, kSetBlock        a: target, b: value or filters (may be null)
//   kMacro, kCallBlock     operators: parameters, items: defaults of the last ones, b: the call
//   kWith                  items: target, value, ...
struct Node {
  Node(NodeKind kind, int line) : kind(kind), line(line) {}
  NodeKind kind;
  int line;
  int depth = 1;  // of the tree below: bounds every recursion over it
  std::string text, attribute;
  Value value;
  NodePtr a, b, c;
  std::vector<NodePtr> items;
  std::vector<std::pair<std::string, NodePtr>> named;
  NodePtr more_items, more_named;
  std::vector<std::string> operators;
  std::vector<Body> bodies;
  bool flag = false;
  bool uses_caller = false, uses_kwargs = false, uses_varargs = false;  // kMacro, kCallBlock
};

struct ParsedTemplate {
  Body body;
  bool has_generation = false;
};
ParsedTemplate parse(const std::string& source);

}  // namespace trireme::jinja
