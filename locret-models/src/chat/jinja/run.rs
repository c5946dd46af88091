//! What a template does.

use super::{
    Fault, Meter, Outcome, fault, filters, format, methods,
    syntax::{Args, Body, Compare, Expr, For, Macro, Node, Op, Step, Target},
    value::{Loop, Map, Value, data, undefined},
};
use std::{cell::RefCell, cmp::Ordering, collections::HashMap, mem, rc::Rc, sync::Arc};

/// What `strftime_now` does with a format.
pub(in crate::chat) type Clock<'a> = &'a (dyn Fn(&str) -> Result<String, String> + Sync);

/// The longest `range`, as in Jinja's sandbox.
const RANGE: i64 = 100_000;

type Scope = HashMap<Arc<str>, Value>;

/// What can be called.
#[derive(Debug)]
pub(in crate::chat) enum Callable {
    Function(&'static str),
    Method(Value, Arc<str>),
    /// With what could be seen where it was written.
    Macro(Arc<Macro>, Vec<Scope>),
}

/// Arguments, computed.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(Arc<str>, Value)>,
}

impl Given {
    /// The arguments of these names, by place or by name.
    pub(super) fn bind<const N: usize>(self, names: [&str; N]) -> Outcome<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return Err(fault(format!(
                "at most {N} arguments were expected, found {}",
                self.positional.len()
            )));
        }
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|known| **known == *name) {
                Some(at) => bound[at] = Some(value),
                None => return Err(fault(format!("an unexpected argument {name:?}"))),
            }
        }
        Ok(bound)
    }
}

enum Flow {
    On,
    Break,
    Continue,
}

/// Text that is being written.
struct Out {
    text: String,
    limit: usize,
}

/// One rendering.
pub(super) struct Run<'a> {
    pub(super) meter: &'a Meter,
    clock: Option<Clock<'a>>,
    root: Scope,
    scopes: Vec<Scope>,
    line: u32,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        meter: &'a Meter,
        variables: Vec<(Arc<str>, Value)>,
        clock: Option<Clock<'a>>,
    ) -> Self {
        Self {
            meter,
            clock,
            root: variables.into_iter().collect(),
            scopes: Vec::new(),
            line: 1,
        }
    }

    pub(super) fn template(&mut self, body: &Body, limit: usize) -> Outcome<String> {
        let mut out = Out {
            text: String::new(),
            limit,
        };
        match self.body(body, &mut out) {
            Ok(_) => Ok(out.text),
            Err(fault) => Err(fault.at(self.line)),
        }
    }

    fn body(&mut self, body: &Body, out: &mut Out) -> Outcome<Flow> {
        self.meter.enter()?;
        let mut flow = Flow::On;
        for node in body {
            flow = self.node(node, out)?;
            if out.text.len() > out.limit {
                return Err(fault(format!(
                    "a text of at most {} bytes was expected of these messages",
                    out.limit
                )));
            }
            if !matches!(flow, Flow::On) {
                break;
            }
        }
        self.meter.leave();
        Ok(flow)
    }

    /// A body in a scope of its own.
    fn scoped(&mut self, scope: Scope, body: &Body, out: &mut Out) -> Outcome<Flow> {
        self.scopes.push(scope);
        let flow = self.body(body, out)?;
        self.scopes.pop();
        Ok(flow)
    }

    /// The text of a body.
    fn captured(&mut self, scope: Scope, body: &Body) -> Outcome<(Flow, String)> {
        let mut out = Out {
            text: String::new(),
            limit: usize::MAX,
        };
        let flow = self.scoped(scope, body, &mut out)?;
        Ok((flow, out.text))
    }

    fn node(&mut self, node: &Node, out: &mut Out) -> Outcome<Flow> {
        self.meter.steps(1)?;
        match node {
            Node::Text(text) => {
                self.meter.makes(text.len())?;
                out.text.push_str(text);
            }
            Node::Emit(line, value) => {
                self.line = *line;
                let value = self.eval(value)?;
                value.print(&mut out.text, self.meter)?;
            }
            Node::If(line, branches, otherwise) => {
                self.line = *line;
                for (condition, body) in branches {
                    if self.eval(condition)?.truth() {
                        return self.body(body, out);
                    }
                }
                return self.body(otherwise, out);
            }
            Node::For(inner) => return self.for_loop(inner, out),
            Node::Set(line, target, value) => {
                self.line = *line;
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            Node::SetBlock(line, name, filters, body) => {
                let (flow, text) = self.captured(Scope::new(), body)?;
                self.line = *line;
                let value = self.filtered(Value::made(text), filters)?;
                self.set(name.clone(), value);
                return Ok(flow);
            }
            Node::FilterBlock(line, filters, body) => {
                let (flow, text) = self.captured(Scope::new(), body)?;
                self.line = *line;
                let value = self.filtered(Value::made(text), filters)?;
                value.print(&mut out.text, self.meter)?;
                return Ok(flow);
            }
            Node::Macro(inner) => {
                let value = self.closure(inner)?;
                self.set(inner.name.clone(), value);
            }
            Node::Call(line, caller, call) => {
                self.line = *line;
                let caller = self.closure(caller)?;
                let value = self.call_with(call, caller)?;
                value.print(&mut out.text, self.meter)?;
            }
            Node::With(line, pairs, body) => {
                self.line = *line;
                let mut values = Vec::with_capacity(pairs.len());
                for (target, value) in pairs {
                    values.push((target, self.eval(value)?));
                }
                self.scopes.push(Scope::new());
                for (target, value) in values {
                    self.assign(target, value)?;
                }
                let flow = self.body(body, out)?;
                self.scopes.pop();
                return Ok(flow);
            }
            Node::Plain(body) => return self.body(body, out),
            Node::Do(line, value) => {
                self.line = *line;
                self.eval(value)?;
            }
            Node::Break => return Ok(Flow::Break),
            Node::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    fn for_loop(&mut self, inner: &For, out: &mut Out) -> Outcome<Flow> {
        self.line = inner.line;
        let mut items = self.eval(&inner.over)?.iterate(self.meter)?;
        if let Some(filter) = &inner.filter {
            let mut kept = Vec::new();
            for item in items {
                self.scopes.push(Scope::new());
                self.assign(&inner.target, item.clone())?;
                if self.eval(filter)?.truth() {
                    kept.push(item);
                }
                self.scopes.pop();
            }
            items = kept;
        }
        if items.is_empty() {
            return self.body(&inner.otherwise, out);
        }
        let (items, seen): (Rc<[Value]>, _) = (items.into(), Rc::default());
        for (index, item) in items.iter().enumerate() {
            self.meter.steps(4)?;
            let state = Loop {
                index,
                items: items.clone(),
                seen: Rc::clone(&seen),
            };
            self.scopes.push(Scope::new());
            self.assign(&inner.target, item.clone())?;
            self.set("loop".into(), Value::Loop(Rc::new(state)));
            let flow = self.body(&inner.body, out)?;
            self.scopes.pop();
            if matches!(flow, Flow::Break) {
                break;
            }
        }
        Ok(Flow::On)
    }

    fn closure(&self, inner: &Arc<Macro>) -> Outcome<Value> {
        self.copies(&self.scopes)?;
        let closure = Callable::Macro(inner.clone(), self.scopes.clone());
        Ok(Value::Callable(Rc::new(closure)))
    }

    fn copies(&self, scopes: &[Scope]) -> Outcome<()> {
        let seen: usize = scopes.iter().map(|scope| 4 + scope.len()).sum();
        self.meter.elements(seen.saturating_mul(2))
    }

    fn filtered(&mut self, value: Value, filters: &[(Arc<str>, Args)]) -> Outcome<Value> {
        let mut value = value;
        for (name, args) in filters {
            let given = self.given(args)?;
            value = filters::apply(self, name, value, given)?;
        }
        Ok(value)
    }

    fn set(&mut self, name: Arc<str>, value: Value) {
        self.scopes
            .last_mut()
            .unwrap_or(&mut self.root)
            .insert(name, value);
    }

    fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
        match target {
            Target::Name(name) => self.set(name.clone(), value),
            Target::Attribute(name, attribute) => match self.lookup(name) {
                Value::Namespace(inner) => {
                    data(&value)?;
                    inner.borrow_mut().insert(attribute.clone(), value);
                }
                other => {
                    return Err(fault(format!(
                        "only attributes of a namespace can be set; {name} is a {}",
                        other.kind()
                    )));
                }
            },
            Target::Tuple(targets) => {
                let values = value.defined()?.iterate(self.meter)?;
                if values.len() != targets.len() {
                    return Err(fault(format!(
                        "{} values were expected, found {}",
                        targets.len(),
                        values.len()
                    )));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value)?;
                }
            }
        }
        Ok(())
    }

    fn lookup(&self, name: &Arc<str>) -> Value {
        let found = self.scopes.iter().rev().find_map(|scope| scope.get(name));
        if let Some(value) = found.or_else(|| self.root.get(name)) {
            return value.clone();
        }
        let function = match &**name {
            "range" => "range",
            "dict" => "dict",
            "namespace" => "namespace",
            "raise_exception" => "raise_exception",
            "strftime_now" if self.clock.is_some() => "strftime_now",
            _ => return Value::Undefined(name.clone()),
        };
        Value::Callable(Rc::new(Callable::Function(function)))
    }

    pub(super) fn eval(&mut self, expr: &Expr) -> Outcome<Value> {
        self.meter.enter()?;
        let value = self.value(expr)?;
        self.meter.leave();
        Ok(value)
    }

    fn value(&mut self, expr: &Expr) -> Outcome<Value> {
        Ok(match expr {
            Expr::None => Value::None,
            Expr::Bool(b) => Value::Bool(*b),
            Expr::Int(n) => Value::Int(*n),
            Expr::Float(x) => Value::Float(*x),
            Expr::Str(s) => Value::Str(s.clone()),
            Expr::Name(name) => self.lookup(name),
            Expr::List(items) => {
                let items = self.values(items)?;
                Value::list(self.meter, items)?
            }
            Expr::Tuple(items) => {
                let items = self.values(items)?;
                Value::tuple(self.meter, items)?
            }
            Expr::Dict(pairs) => {
                let mut entries = Vec::with_capacity(pairs.len());
                for (key, value) in pairs {
                    entries.push((self.eval(key)?, self.eval(value)?));
                }
                Value::map(self.meter, entries)?
            }
            Expr::Path(first, steps) => self.path(first, steps, None)?,
            Expr::Not(inner) => Value::Bool(!self.eval(inner)?.truth()),
            Expr::Minus(inner) => match self.eval(inner)? {
                Value::Float(x) => Value::Float(-x),
                other => Value::Int(whole(&other)?.checked_neg().ok_or_else(overflow)?),
            },
            Expr::Plus(inner) => match self.eval(inner)? {
                Value::Float(x) => Value::Float(x),
                other => Value::Int(whole(&other)?),
            },
            Expr::Chain(first, rest) => self.chain(first, rest)?,
            Expr::Compare(first, rest) => {
                let mut left = self.eval(first)?;
                for (op, right) in rest {
                    let right = self.eval(right)?;
                    if !self.compares(*op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            Expr::And(parts) => return self.first(parts, false),
            Expr::Or(parts) => return self.first(parts, true),
            Expr::Cond(condition, then, otherwise) => {
                if self.eval(condition)?.truth() {
                    return self.eval(then);
                }
                match otherwise {
                    Some(otherwise) => return self.eval(otherwise),
                    None => Value::Undefined("a condition without an else".into()),
                }
            }
        })
    }

    fn values(&mut self, items: &[Expr]) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.eval(item)).collect()
    }

    /// The first value of this truth, else the last.
    fn first(&mut self, parts: &[Expr], truth: bool) -> Outcome<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.eval(part)?;
            if value.truth() == truth {
                break;
            }
        }
        Ok(value)
    }

    fn compares(&self, op: Compare, left: &Value, right: &Value) -> Outcome<bool> {
        let meter = self.meter;
        if let (Some(a), Some(b)) = (left.as_number(), right.as_number())
            && (a.is_nan() || b.is_nan())
        {
            return Ok(op == Compare::Unequal);
        }
        let order = || left.defined()?.order(right.defined()?, meter);
        Ok(match op {
            Compare::Equal => left.equals(right, meter)?,
            Compare::Unequal => !left.equals(right, meter)?,
            Compare::Less => order()? == Ordering::Less,
            Compare::LessEqual => order()? != Ordering::Greater,
            Compare::Greater => order()? == Ordering::Greater,
            Compare::GreaterEqual => order()? != Ordering::Less,
            Compare::In => right.contains(left, meter)?,
            Compare::NotIn => !right.contains(left, meter)?,
        })
    }

    fn chain(&mut self, first: &Expr, rest: &[(Op, Expr)]) -> Outcome<Value> {
        let mut left = self.eval(first)?;
        // Texts are put together in one place instead of once for each sign.
        let mut text: Option<String> = None;
        for (op, right) in rest {
            let right = self.eval(right)?;
            let joins = match op {
                Op::Concat => true,
                Op::Add => (text.is_some() || left.as_str().is_some()) && right.as_str().is_some(),
                _ => false,
            };
            if joins {
                let text = match &mut text {
                    Some(text) => text,
                    None => {
                        let mut begun = String::new();
                        left.print(&mut begun, self.meter)?;
                        text.insert(begun)
                    }
                };
                right.print(text, self.meter)?;
                continue;
            }
            if let Some(text) = text.take() {
                left = Value::made(text);
            }
            left = self.binary(*op, left, right)?;
        }
        Ok(match text {
            Some(text) => Value::made(text),
            None => left,
        })
    }

    fn binary(&mut self, op: Op, left: Value, right: Value) -> Outcome<Value> {
        let meter = self.meter;
        left.defined()?;
        right.defined()?;
        match (op, &left, &right) {
            (Op::Add, Value::List(a), Value::List(b)) => {
                return Value::list(meter, joined(meter, &a.items, &b.items)?);
            }
            (Op::Add, Value::Tuple(a), Value::Tuple(b)) => {
                return Value::tuple(meter, joined(meter, &a.items, &b.items)?);
            }
            (Op::Multiply, Value::Str(s), n) | (Op::Multiply, n, Value::Str(s)) => {
                let times = usize::try_from(whole(n)?).unwrap_or(0);
                meter.makes(s.len().saturating_mul(times))?;
                return Ok(Value::made(s.repeat(times)));
            }
            (Op::Multiply, Value::List(list), n) | (Op::Multiply, n, Value::List(list)) => {
                let times = usize::try_from(whole(n)?).unwrap_or(0);
                meter.elements(list.items.len().saturating_mul(times))?;
                let n = list.items.len() * times;
                return Value::list(meter, list.items.iter().cycle().take(n).cloned().collect());
            }
            (Op::Remainder, Value::Str(s), _) => {
                let text = format::percent(meter, s, &right)?;
                return Ok(Value::made(text));
            }
            _ => {}
        }
        if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
            let whole = |n: Option<i64>| n.map(Value::Int).ok_or_else(overflow);
            return match op {
                Op::Add => whole(a.checked_add(b)),
                Op::Subtract => whole(a.checked_sub(b)),
                Op::Multiply => whole(a.checked_mul(b)),
                Op::Divide if b != 0 => Ok(Value::Float(a as f64 / b as f64)),
                // Python rounds down, and a remainder has the divisor's sign.
                Op::FloorDivide if b != 0 => whole(
                    a.checked_div(b)
                        .map(|q| q - i64::from(a % b != 0 && (a < 0) != (b < 0))),
                ),
                Op::Remainder if b != 0 => whole(a.checked_rem(b).map(|r| {
                    if r != 0 && (r < 0) != (b < 0) {
                        r + b
                    } else {
                        r
                    }
                })),
                Op::Power => match u32::try_from(b) {
                    Ok(power) => whole(a.checked_pow(power)),
                    Err(_) => Ok(Value::Float((a as f64).powf(b as f64))),
                },
                _ => Err(fault("a division by zero")),
            };
        }
        if let (Some(a), Some(b)) = (left.as_number(), right.as_number()) {
            let x = match op {
                Op::Add => a + b,
                Op::Subtract => a - b,
                Op::Multiply => a * b,
                Op::Power => a.powf(b),
                _ if b == 0.0 => return Err(fault("a division by zero")),
                Op::Divide => a / b,
                Op::FloorDivide => (a / b).floor(),
                _ => a - b * (a / b).floor(),
            };
            return Ok(Value::Float(x));
        }
        Err(fault(format!(
            "no arithmetic with a {} and a {}",
            left.kind(),
            right.kind()
        )))
    }

    fn given(&mut self, args: &Args) -> Outcome<Given> {
        let positional = self.values(&args.positional)?;
        let mut named = Vec::with_capacity(args.named.len());
        for (name, value) in &args.named {
            named.push((name.clone(), self.eval(value)?));
        }
        Ok(Given { positional, named })
    }

    /// A call, whose callee gets `caller` as well.
    fn call_with(&mut self, call: &Expr, caller: Value) -> Outcome<Value> {
        match call {
            Expr::Path(first, steps) => self.path(first, steps, Some(caller)),
            other => self.eval(other),
        }
    }

    /// A value, and what is asked of it one after the other. `caller`: for the last call.
    fn path(&mut self, first: &Expr, steps: &[Step], caller: Option<Value>) -> Outcome<Value> {
        let mut value = self.eval(first)?;
        let mut caller = caller;
        for (i, step) in steps.iter().enumerate() {
            self.meter.steps(1)?;
            value = match step {
                Step::Attribute(name) => self.attribute(&value, name)?,
                Step::Index(index) => {
                    let index = self.eval(index)?;
                    self.item(&value, &index)?
                }
                Step::Slice(parts) => {
                    let mut bounds = [None; 3];
                    for (bound, part) in bounds.iter_mut().zip(parts.iter()) {
                        let part = part.as_ref().map(|part| self.eval(part)).transpose()?;
                        *bound = match part {
                            None | Some(Value::None) => None,
                            Some(part) => Some(whole(&part)?),
                        };
                    }
                    self.slice(&value, bounds)?
                }
                Step::Call(args) => {
                    let mut given = self.given(args)?;
                    if i + 1 == steps.len()
                        && let Some(caller) = caller.take()
                    {
                        given.named.push(("caller".into(), caller));
                    }
                    self.call(&value, given)?
                }
                Step::Filter(name, args) => {
                    let given = self.given(args)?;
                    filters::apply(self, name, value, given)?
                }
                Step::Test(name, args, fails) => {
                    let given = self.given(args)?;
                    Value::Bool(filters::test(self, name, &value, given)? != *fails)
                }
            };
        }
        Ok(value)
    }

    pub(super) fn attribute(&self, value: &Value, name: &Arc<str>) -> Outcome<Value> {
        let value = value.defined()?;
        let found = match value {
            Value::Map(map) if !methods::of(value, name) => map.named(name).cloned(),
            Value::Namespace(inner) => inner.borrow().get(name).cloned(),
            Value::Loop(state) => state.attribute(name),
            _ => None,
        };
        Ok(match found {
            Some(found) => found,
            None if methods::of(value, name) => {
                Value::Callable(Rc::new(Callable::Method(value.clone(), name.clone())))
            }
            None => Value::Undefined(format!("{name} of a {}", value.kind()).into()),
        })
    }

    pub(super) fn item(&self, value: &Value, index: &Value) -> Outcome<Value> {
        let found = match (value.defined()?, index) {
            (Value::Map(map), key) => map.get(key, self.meter)?.cloned(),
            (Value::List(list) | Value::Tuple(list), Value::Int(at)) => {
                place(*at, list.items.len()).map(|at| list.items[at].clone())
            }
            (Value::Str(s), Value::Int(at)) => {
                self.meter.reads(s.len())?;
                let c = match usize::try_from(*at) {
                    Ok(at) => s.chars().nth(at),
                    Err(_) => s.chars().nth_back(at.unsigned_abs() as usize - 1),
                };
                c.map(|c| Value::text(c.encode_utf8(&mut [0; 4])))
            }
            (Value::Namespace(_) | Value::Loop(_), Value::Str(name)) => {
                Some(self.attribute(value, name)?)
            }
            _ => None,
        };
        Ok(match found {
            Some(found) => found,
            None => {
                let mut name = String::from("item ");
                match index {
                    Value::Str(s) => name.extend(s.chars().take(60)),
                    Value::Int(n) => name += &n.to_string(),
                    other => name += other.kind(),
                }
                Value::Undefined(format!("{name} of a {}", value.kind()).into())
            }
        })
    }

    fn slice(&self, value: &Value, [start, end, step]: [Option<i64>; 3]) -> Outcome<Value> {
        let meter = self.meter;
        let value = value.defined()?;
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err(fault("a slice with steps of zero"));
        }
        let pick = |length: usize| {
            let n = length as i64;
            let (low, high) = if step > 0 { (0, n) } else { (-1, n - 1) };
            let bound = |at: Option<i64>, default: i64| match at {
                None => default,
                Some(at) if at < 0 => at.saturating_add(n).clamp(low, high),
                Some(at) => at.clamp(low, high),
            };
            let (from, to) = match step > 0 {
                true => (bound(start, 0), bound(end, n)),
                false => (bound(start, n - 1), bound(end, -1)),
            };
            let mut at = from;
            std::iter::from_fn(move || {
                let inside = if step > 0 { at < to } else { at > to };
                let found = inside.then_some(at as usize);
                at = at.saturating_add(step);
                found
            })
        };
        match value {
            Value::Str(s) => {
                meter.makes(s.len().saturating_mul(6))?;
                let chars: Vec<char> = s.chars().collect();
                Ok(Value::made(pick(chars.len()).map(|at| chars[at]).collect()))
            }
            Value::List(list) | Value::Tuple(list) => {
                meter.elements(list.items.len())?;
                let items = pick(list.items.len()).map(|at| list.items[at].clone());
                let items = items.collect();
                match value {
                    Value::List(_) => Value::list(meter, items),
                    _ => Value::tuple(meter, items),
                }
            }
            other => Err(fault(format!("a {} cannot be sliced", other.kind()))),
        }
    }

    fn call(&mut self, callee: &Value, given: Given) -> Outcome<Value> {
        match callee {
            Value::Callable(callable) => match &**callable {
                Callable::Function(name) => self.function(name, given),
                Callable::Method(value, name) => methods::call(self.meter, value, name, given),
                Callable::Macro(inner, scopes) => self.call_macro(inner, scopes, given),
            },
            Value::Undefined(name) if &**name == "strftime_now" => Err(fault(
                "the template asks strftime_now for the day, and was given none",
            )),
            Value::Undefined(name) => Err(undefined(name)),
            other => Err(fault(format!("a {} cannot be called", other.kind()))),
        }
    }

    fn call_macro(&mut self, inner: &Macro, scopes: &[Scope], given: Given) -> Outcome<Value> {
        self.copies(scopes)?;
        if given.positional.len() > inner.parameters.len() {
            return Err(fault(format!(
                "the macro {} takes at most {} arguments, found {}",
                inner.name,
                inner.parameters.len(),
                given.positional.len()
            )));
        }
        let mut own = Scope::new();
        let mut positional = given.positional.into_iter();
        let mut named = given.named;
        let outer = mem::replace(&mut self.scopes, scopes.to_vec());
        if let Some(at) = named.iter().position(|(name, _)| &**name == "caller") {
            let (name, caller) = named.swap_remove(at);
            own.insert(name, caller);
        }
        self.scopes.push(own);
        for (name, default) in &inner.parameters {
            let by_name = named.iter().position(|(given, _)| given == name);
            let value = match (positional.next(), by_name) {
                (Some(value), None) => value,
                (None, Some(at)) => named.swap_remove(at).1,
                (Some(_), Some(_)) => {
                    return Err(fault(format!("the argument {name} is given twice")));
                }
                (None, None) => match default {
                    Some(default) => self.eval(default)?,
                    None => Value::Undefined(name.clone()),
                },
            };
            self.set(name.clone(), value);
        }
        if let Some((name, _)) = named.first() {
            return Err(fault(format!(
                "the macro {} has no argument {name}",
                inner.name
            )));
        }
        let (_, text) = self.captured(Scope::new(), &inner.body)?;
        self.scopes = outer;
        Ok(Value::made(text))
    }

    fn function(&mut self, name: &str, given: Given) -> Outcome<Value> {
        let meter = self.meter;
        match name {
            "range" => {
                let bounds = given.bind(["", "", ""])?;
                let bound = |i: usize| bounds[i].as_ref().map(whole).transpose();
                let (first, second, step) = (bound(0)?, bound(1)?, bound(2)?.unwrap_or(1));
                let (from, to) = match (first, second) {
                    (None, _) => return Err(fault("range: a number was expected")),
                    (Some(end), None) => (0, end),
                    (Some(from), Some(to)) => (from, to),
                };
                let length = match step {
                    0 => return Err(fault("range: steps of zero")),
                    1.. if from < to => (to.abs_diff(from) - 1) / step.unsigned_abs() + 1,
                    ..0 if from > to => (from.abs_diff(to) - 1) / step.unsigned_abs() + 1,
                    _ => 0,
                };
                if length > RANGE as u64 {
                    return Err(fault(format!("range: at most {RANGE} numbers")));
                }
                meter.elements(length as usize)?;
                let items = (0..length as i64).map(|i| Value::Int(from + i * step));
                Value::list(meter, items.collect())
            }
            "dict" => {
                let mut entries = match given.positional.as_slice() {
                    [] => Vec::new(),
                    [one] => pairs(meter, one)?,
                    _ => return Err(fault("dict: one argument was expected")),
                };
                entries.extend(given.named.into_iter().map(|(k, v)| (Value::Str(k), v)));
                Value::map(meter, entries)
            }
            "namespace" => {
                let mut attributes = Scope::new();
                for argument in &given.positional {
                    for (key, value) in pairs(meter, argument)? {
                        data(&value)?;
                        attributes.insert(key.to_text(meter)?, value);
                    }
                }
                for (name, value) in given.named {
                    data(&value)?;
                    attributes.insert(name, value);
                }
                meter.elements(attributes.len())?;
                Ok(Value::Namespace(Rc::new(RefCell::new(attributes))))
            }
            "raise_exception" => {
                let [message] = given.bind(["message"])?;
                let message = message.unwrap_or(Value::None).to_text(meter)?;
                Err(fault(&*message))
            }
            _ => {
                let [format] = given.bind(["format"])?;
                let format = format.unwrap_or(Value::None);
                let (Some(clock), Some(format)) = (self.clock, format.as_str()) else {
                    return Err(fault("strftime_now: a format was expected"));
                };
                meter.makes(format.len().saturating_mul(16))?;
                clock(format).map(Value::made).map_err(fault)
            }
        }
    }
}

impl Loop {
    fn attribute(&self, name: &str) -> Option<Value> {
        let (index, length) = (self.index as i64, self.items.len() as i64);
        let item = |at: Option<usize>| at.and_then(|at| self.items.get(at)).cloned();
        Some(match name {
            "index" => Value::Int(index + 1),
            "index0" => Value::Int(index),
            "revindex" => Value::Int(length - index),
            "revindex0" => Value::Int(length - index - 1),
            "first" => Value::Bool(index == 0),
            "last" => Value::Bool(index + 1 == length),
            "length" => Value::Int(length),
            // Of recursive loops, which there are none of.
            "depth" => Value::Int(1),
            "depth0" => Value::Int(0),
            "previtem" => item(self.index.checked_sub(1))?,
            "nextitem" => item(self.index.checked_add(1))?,
            _ => return None,
        })
    }
}

/// The entries of a dict, or of a list of pairs.
fn pairs(meter: &Meter, value: &Value) -> Outcome<Vec<(Value, Value)>> {
    if let Value::Map(map) = value {
        let entries: &Map = map;
        meter.elements(entries.entries.len().saturating_mul(2))?;
        return Ok(entries.entries.clone());
    }
    let items = value.defined()?.iterate(meter)?;
    let pair = |item: &Value| match item.elements() {
        Some([key, value]) => Ok((key.clone(), value.clone())),
        _ => Err(fault("pairs were expected")),
    };
    items.iter().map(pair).collect()
}

fn joined(meter: &Meter, a: &[Value], b: &[Value]) -> Outcome<Vec<Value>> {
    meter.elements(a.len() + b.len())?;
    Ok([a, b].concat())
}

/// The place of an index that may count from the end.
pub(super) fn place(at: i64, length: usize) -> Option<usize> {
    let at = match usize::try_from(at) {
        Ok(at) => at,
        Err(_) => length.checked_sub(usize::try_from(at.unsigned_abs()).ok()?)?,
    };
    (at < length).then_some(at)
}

pub(super) fn whole(value: &Value) -> Outcome<i64> {
    value.as_int().ok_or_else(|| match value {
        Value::Undefined(name) => undefined(name),
        other => fault(format!(
            "a whole number was expected, found a {}",
            other.kind()
        )),
    })
}

fn overflow() -> Fault {
    fault("a whole number of more than 64 bits")
}
