// Evaluates the tree of a template.
#include "data/jinja.h"

#include "base/check.h"
#include "data/jinja_loop.h"
#include "data/jinja_node.h"
#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

struct Scope {
  explicit Scope(std::shared_ptr<Scope> parent) : parent(std::move(parent)) {}
  Value* find(const std::string& name) {
    for (Scope* scope = this; scope; scope = scope->parent.get())
      for (auto& [key, value] : scope->variables)
        if (key == name) return &value;
    return nullptr;
  }
  void set(const std::string& name, Value value) {
    for (auto& [key, old] : variables) {
      if (key == name) {
        old = std::move(value);
        return;
      }
    }
    variables.emplace_back(name, std::move(value));
  }
  std::shared_ptr<Scope> parent;
  std::vector<std::pair<std::string, Value>> variables;
};
using ScopePtr = std::shared_ptr<Scope>;

enum class Flow { kNormal, kBreak, kContinue };

class Evaluator {
 public:
  explicit Evaluator(Runtime& runtime) : runtime_(runtime) {}
  // Macros hold their scopes and scopes hold macros: the circles are cut here.
  ~Evaluator() {
    for (const ScopePtr& scope : captured_) scope->variables.clear();
  }

  Rendering render(const Body& body, const Json& variables) {
    scope_ = std::make_shared<Scope>(nullptr);
    captured_.push_back(scope_);
    for (const auto& [key, value] : variables.items()) scope_->set(key, runtime_.from_json(value));
    enter();  // the template's own variables hide the caller's
    out_ = &rendering_.text;
    exec(body);
    return std::move(rendering_);
  }

  int line() const { return line_; }

 private:
  struct ScopeHold {  // restores the scope
    explicit ScopeHold(Evaluator& evaluator) : evaluator(evaluator), before(evaluator.scope_) {}
    ~ScopeHold() { evaluator.scope_ = std::move(before); }
    Evaluator& evaluator;
    ScopePtr before;
  };
  struct OutputHold {  // sends the output into `buffer`
    OutputHold(Evaluator& evaluator, std::string& buffer) : evaluator(evaluator), before(evaluator.out_) {
      evaluator.out_ = &buffer;
    }
    ~OutputHold() { evaluator.out_ = before; }
    Evaluator& evaluator;
    std::string* before;
  };

  void enter() { scope_ = std::make_shared<Scope>(scope_); }

  void write(const std::string& text) {
    runtime_.step(1 + text.size() / 64);
    runtime_.check_string(out_->size() + text.size());
    *out_ += text;
  }

  // --- statements
  // -----------------------------------------------------------------------------------------------------
  Flow exec(const Body& body) {
    for (const NodePtr& node : body)
      if (Flow flow = exec(*node); flow != Flow::kNormal) return flow;
    return Flow::kNormal;
  }

  Flow exec(const Node& node) {
    Runtime::Depth depth(runtime_);
    runtime_.step();
    line_ = node.line;
    switch (node.kind) {
      case NodeKind::kText:
        write(node.text);
        break;
      case NodeKind::kPrint: {
        Value value = eval(*node.a);
        value.is_string() ? write(value.text()) : write(runtime_.str(value));
        break;
      }
      case NodeKind::kIf:
        for (size_t i = 0; i < node.items.size(); ++i)
          if (Runtime::truth(eval(*node.items[i]))) return exec(node.bodies[i]);
        return node.bodies.size() > node.items.size() ? exec(node.bodies.back()) : Flow::kNormal;
      case NodeKind::kFor:
        run_loop(node, eval(*node.b), 0);
        break;
      case NodeKind::kSet:
        assign(*node.a, eval(*node.b));
        break;
      case NodeKind::kSetBlock:
      case NodeKind::kFilterBlock: {
        std::string buffer;
        {
          ScopeHold scope(*this);
          OutputHold output(*this, buffer);
          enter();
          if (Flow flow = exec(node.bodies[0]); flow != Flow::kNormal) return flow;
        }
        Value value = runtime_.text(std::move(buffer));
        if (node.b) value = apply_filters(*node.b, value);
        if (node.kind == NodeKind::kSetBlock)
          assign(*node.a, value);
        else
          write(runtime_.str(value));
        break;
      }
      case NodeKind::kMacro:
        scope_->set(node.text, make_macro(node));
        break;
      case NodeKind::kCallBlock: {
        Args args = arguments(*node.b);
        args.named.emplace_back("caller", make_macro(node));
        write(runtime_.str(runtime_.call(eval(*node.b->a), args)));
        break;
      }
      case NodeKind::kWith: {
        std::vector<Value> values;
        for (size_t i = 1; i < node.items.size(); i += 2) values.push_back(eval(*node.items[i]));
        ScopeHold scope(*this);
        enter();
        for (size_t i = 0; i < values.size(); ++i) assign(*node.items[2 * i], values[i]);
        return exec(node.bodies[0]);
      }
      case NodeKind::kGeneration: {
        ScopeHold scope(*this);
        enter();
        size_t begin = out_->size();
        bool outermost = out_ == &rendering_.text;
        exec(node.bodies[0]);
        if (outermost)
          rendering_.generations.emplace_back(begin, out_->size());
        else
          rendering_.nested_generation = true;
        break;
      }
      case NodeKind::kBlock: {
        ScopeHold scope(*this);
        enter();
        exec(node.bodies[0]);
        break;
      }
      case NodeKind::kBreak:
        return Flow::kBreak;
      case NodeKind::kContinue:
        return Flow::kContinue;
      default:
        break;
    }
    return Flow::kNormal;
  }

  void run_loop(const Node& node, const Value& iterable, int64_t depth0) {
    auto loop = std::make_shared<LoopObject>();
    loop->source = runtime_.iterate(iterable);
    for (const Value& item : loop->source) loop->nesting = std::max(loop->nesting, item.nesting() + 1);
    loop->depth0 = depth0;
    ScopePtr outer = scope_;
    if (node.c)
      loop->test = [this, &node, outer](const Value& item) {
        ScopeHold scope(*this);
        scope_ = outer;
        enter();
        assign(*node.a, item);
        return Runtime::truth(eval(*node.c));
      };
    if (node.flag)
      loop->recurse = [this, &node, outer, depth0](const Value& items) {
        ScopeHold scope(*this);
        scope_ = outer;
        std::string buffer;
        {
          OutputHold output(*this, buffer);
          run_loop(node, items, depth0 + 1);
        }
        return runtime_.text(std::move(buffer));
      };
    struct Close {  // the functions hold scopes, which may hold the loop
      LoopObject& loop;
      ~Close() { loop.test = nullptr, loop.recurse = nullptr; }
    } close{*loop};
    Value value = Value::of(Kind::kLoop, loop);
    ScopeHold scope(*this);
    while (loop->next()) {
      runtime_.step();
      scope_ = outer;
      enter();
      scope_->set("loop", value);
      assign(*node.a, *loop->current);
      if (exec(node.bodies[0]) == Flow::kBreak) break;
    }
    if (loop->index0 < 0 && !node.bodies[1].empty()) {
      scope_ = outer;
      enter();
      exec(node.bodies[1]);
    }
  }

  void assign(const Node& target, const Value& value) {
    if (target.kind == NodeKind::kName) {
      scope_->set(target.text, value);
    } else if (target.kind == NodeKind::kNamespaceRef) {
      Value* space = scope_->find(target.text);
      if (!space || !space->is(Kind::kNamespace)) fail("cannot assign attribute on non-namespace object");
      if (target.attribute.starts_with("_"))
        fail("Chat templates cannot store underscore-prefixed attributes on a namespace, but got " +
             string_repr(target.attribute) + ". Please rename the attribute.");
      space->as_namespace().set(Value::string(target.attribute), value);
    } else {
      if (value.is_number() || value.is_none() || value.is(Kind::kFunction) || value.is(Kind::kNamespace))
        fail("cannot unpack non-iterable " + value.type_name() + " object");
      std::vector<Value> items = runtime_.iterate(value);
      std::string wanted = std::to_string(target.items.size());
      if (items.size() > target.items.size()) fail("too many values to unpack (expected " + wanted + ")");
      if (items.size() < target.items.size())
        fail("not enough values to unpack (expected " + wanted + ", got " + std::to_string(items.size()) + ")");
      for (size_t i = 0; i < items.size(); ++i) assign(*target.items[i], items[i]);
    }
  }

  Value make_macro(const Node& node) {
    captured_.push_back(scope_);
    runtime_.step();
    return Value::function(
        node.text, [this, &node, outer = scope_](Runtime&, const Args& args) { return call_macro(node, outer, args); });
  }

  // As jinja2.runtime.Macro.__call__.
  Value call_macro(const Node& node, const ScopePtr& outer, const Args& args) {
    const std::vector<std::string>& names = node.operators;
    std::vector<std::pair<std::string, Value>> named = args.named;
    auto take = [&](const std::string& name) -> std::optional<Value> {
      for (auto it = named.begin(); it != named.end(); ++it) {
        if (it->first != name) continue;
        Value value = it->second;
        named.erase(it);
        return value;
      }
      return std::nullopt;
    };
    ScopeHold scope(*this);
    scope_ = outer;
    enter();
    bool explicit_caller = false;
    for (size_t i = 0; i < names.size(); ++i) {
      explicit_caller = explicit_caller || names[i] == "caller";
      std::optional<Value> value;
      if (i < args.positional.size())
        value = args.positional[i];
      else
        value = take(names[i]);
      size_t num_required = names.size() - node.items.size();
      if (!value)
        value = i >= num_required ? eval(*node.items[i - num_required])
                                  : Value::undefined("parameter " + string_repr(names[i]) + " was not provided");
      scope_->set(names[i], std::move(*value));
    }
    if (node.uses_caller && !explicit_caller) {
      std::optional<Value> caller = take("caller");
      scope_->set("caller", caller ? *caller : Value::undefined("No caller defined"));
    }
    if (node.uses_kwargs) {
      auto dict = std::make_shared<DictObject>();
      for (auto& [name, value] : named) dict->set(Value::string(name), value);
      scope_->set("kwargs", Value::dict(std::move(dict)));
    } else if (!named.empty()) {
      std::string macro = "macro " + string_repr(node.text);
      for (const auto& [name, value] : named)
        if (name == "caller")
          fail(macro + " was invoked with two values for the special caller argument. This is most likely a bug.");
      fail(macro + " takes no keyword argument " + string_repr(named[0].first));
    }
    if (node.uses_varargs) {
      std::vector<Value> rest;
      for (size_t i = names.size(); i < args.positional.size(); ++i) rest.push_back(args.positional[i]);
      scope_->set("varargs", Value::tuple(std::move(rest)));
    } else if (args.positional.size() > names.size()) {
      fail("macro " + string_repr(node.text) + " takes not more than " + std::to_string(names.size()) + " argument(s)");
    }
    std::string buffer;
    {
      OutputHold output(*this, buffer);
      exec(node.bodies[0]);
    }
    return Value::string(std::move(buffer));
  }

  // --- expressions
  // ----------------------------------------------------------------------------------------------------
  Value eval(const Node& node) {
    Runtime::Depth depth(runtime_);
    runtime_.step();
    line_ = node.line;
    switch (node.kind) {
      case NodeKind::kConst:
        return node.value;
      case NodeKind::kName:
        return lookup(node.text);
      case NodeKind::kTuple:
        return Value::tuple(eval_all(node.items));
      case NodeKind::kList:
        return Value::list(eval_all(node.items));
      case NodeKind::kDict: {
        auto dict = std::make_shared<DictObject>();
        for (size_t i = 0; i + 1 < node.items.size(); i += 2) {
          Value key = eval(*node.items[i]);
          dict->set(key, eval(*node.items[i + 1]));
        }
        return Value::dict(std::move(dict));
      }
      case NodeKind::kGetattr:
        return runtime_.attribute(eval(*node.a), node.text);
      case NodeKind::kGetitem: {
        Value object = eval(*node.a);
        if (node.b->kind != NodeKind::kSlice) return runtime_.item(object, eval(*node.b));
        Value parts[3];
        for (size_t i = 0; i < 3; ++i)
          if (node.b->items[i]) parts[i] = eval(*node.b->items[i]);
        return runtime_.slice(object, parts[0], parts[1], parts[2]);
      }
      case NodeKind::kSlice:
        fail("a slice stands in a list of indices");
      case NodeKind::kCall: {
        Value function = eval(*node.a);
        return runtime_.call(function, arguments(node));
      }
      case NodeKind::kFilter: {
        Value value = eval(*node.a);
        return runtime_.filter(node.text, value, arguments(node));
      }
      case NodeKind::kTest: {
        Value value = eval(*node.a);
        return Value::boolean(runtime_.test(node.text, value, arguments(node)));
      }
      case NodeKind::kNot:
        return Value::boolean(!Runtime::truth(eval(*node.a)));
      case NodeKind::kNegative:
        return runtime_.negative(eval(*node.a), true);
      case NodeKind::kPositive:
        return runtime_.negative(eval(*node.a), false);
      case NodeKind::kBinary: {
        Value left = eval(*node.a);
        return runtime_.binary(node.text, left, eval(*node.b));
      }
      case NodeKind::kConcat: {
        std::string out;
        for (const Value& value : eval_all(node.items)) {
          out += runtime_.str(value);
          runtime_.check_string(out.size());
        }
        return runtime_.text(std::move(out));
      }
      case NodeKind::kCompare:
        return compare(node);
      case NodeKind::kAnd: {
        Value left = eval(*node.a);
        return Runtime::truth(left) ? eval(*node.b) : left;
      }
      case NodeKind::kOr: {
        Value left = eval(*node.a);
        return Runtime::truth(left) ? left : eval(*node.b);
      }
      case NodeKind::kConditional:
        if (Runtime::truth(eval(*node.b))) return eval(*node.a);
        if (node.c) return eval(*node.c);
        return Value::undefined("the inline if-expression on line " + std::to_string(node.line) +
                                " evaluated to false and no else section was defined.");
      default:
        fail("this is not an expression");
    }
  }

  std::vector<Value> eval_all(const std::vector<NodePtr>& nodes) {
    std::vector<Value> values;
    values.reserve(nodes.size());
    for (const NodePtr& node : nodes) values.push_back(eval(*node));
    return values;
  }

  Value lookup(const std::string& name) {
    if (const Value* value = scope_->find(name)) return *value;
    Value function = global_function(name);
    return function.is_none() ? Value::undefined(string_repr(name) + " is undefined") : function;
  }

  Args arguments(const Node& node) {
    Args args;
    args.positional = eval_all(node.items);
    for (const auto& [name, value] : node.named) args.named.emplace_back(name, eval(*value));
    if (node.more_items)
      for (const Value& value : runtime_.iterate(eval(*node.more_items))) args.positional.push_back(value);
    if (node.more_named) {
      Value more = eval(*node.more_named);
      if (!more.is(Kind::kDict)) fail("argument after ** must be a mapping, not " + more.type_name());
      for (const auto& [key, value] : more.as_dict().entries) {
        if (!key.is_string()) fail("keywords must be strings");
        args.named.emplace_back(key.text(), value);
      }
    }
    return args;
  }

  // The filters of a filter block or set block: the innermost one has no operand of its own.
  Value apply_filters(const Node& node, const Value& value) {
    Runtime::Depth depth(runtime_);
    Value input = node.a ? apply_filters(*node.a, value) : value;
    return runtime_.filter(node.text, input, arguments(node));
  }

  Value compare(const Node& node) {
    Value left = eval(*node.a), result = Value::boolean(true);
    for (size_t i = 0; i < node.items.size(); ++i) {
      Value right = eval(*node.items[i]);
      const std::string& op = node.operators[i];
      bool holds = op == "=="       ? runtime_.equal(left, right)
                   : op == "!="     ? !runtime_.equal(left, right)
                   : op == "in"     ? runtime_.contains(right, left)
                   : op == "not in" ? !runtime_.contains(right, left)
                                    : ordered(op, left, right);
      if (!holds) return Value::boolean(false);
      left = std::move(right);
    }
    return result;
  }

  bool ordered(const std::string& op, const Value& left, const Value& right) {
    if (op == "<") return runtime_.less(left, right);
    if (op == ">") return runtime_.less(right, left, ">");
    if (op == "<=") return runtime_.less(left, right, "<=") || runtime_.equal(left, right);
    return runtime_.less(right, left, ">=") || runtime_.equal(left, right);
  }

  Runtime& runtime_;
  Rendering rendering_;
  std::string* out_ = nullptr;
  ScopePtr scope_;
  std::vector<ScopePtr> captured_;
  int line_ = 0;
};

[[noreturn]] void fail_at(const std::string& name, int line, const std::string& message) {
  throw DataError(str(name, " line ", line, ": ", message));
}

bool valid_utf8(const std::string& text) {
  // The JSON library checks UTF-8 when it writes; cheaper than a second decoder of our own.
  try {
    Json(text).dump();
    return true;
  } catch (const Json::exception&) {
    return false;
  }
}

}  // namespace

Template::Template(const std::string& text, std::string name) : name_(std::move(name)) {
  if (text.size() > kMaxTemplateBytes)
    throw DataError(
        str(name_, ": a chat template of ", text.size(), " bytes; at most ", kMaxTemplateBytes, " are allowed."));
  if (!valid_utf8(text)) throw DataError(str(name_, ": the chat template is not UTF-8 text."));
  try {
    ParsedTemplate parsed = parse(text);
    body_ = std::move(parsed.body);
    has_generation_ = parsed.has_generation;
  } catch (const TemplateError& error) {
    fail_at(name_, error.line, error.message);
  }
}

Template::~Template() = default;

Rendering Template::render(const Json& variables, const Limits& limits, uint64_t* steps) const {
  Runtime runtime(limits);
  Evaluator evaluator(runtime);
  auto count = [&] {
    if (steps) *steps += runtime.steps();
  };
  try {
    Rendering rendering = evaluator.render(body_, variables);
    count();
    return rendering;
  } catch (const TemplateError& error) {
    count();
    fail_at(name_, error.line ? error.line : evaluator.line(), error.message);
  }
}

}  // namespace trireme::jinja
