//! Tokens to a tree, whose depth is bounded.

use super::{Fault, Outcome, fault, lexer::Token};
use std::{mem, sync::Arc};

/// How deep blocks and expressions may be nested in a source, and how long one chain of operators,
/// filters or attributes may be.
const DEPTH: u32 = 120;
const CHAIN: usize = 500;

pub(super) type Body = Vec<Node>;

#[derive(Debug)]
pub(super) enum Node {
    Text(Arc<str>),
    Emit(u32, Expr),
    /// Branches in order, then what is left.
    If(u32, Vec<(Expr, Body)>, Body),
    For(Box<For>),
    Set(u32, Target, Expr),
    /// A name, and the filters that its text goes through.
    SetBlock(u32, Arc<str>, Vec<(Arc<str>, Args)>, Body),
    FilterBlock(u32, Vec<(Arc<str>, Args)>, Body),
    Macro(Arc<Macro>),
    /// A call of what is given the body as `caller`.
    Call(u32, Arc<Macro>, Expr),
    With(u32, Vec<(Target, Expr)>, Body),
    /// A body that stands for itself.
    Plain(Body),
    Do(u32, Expr),
    Break,
    Continue,
}

#[derive(Debug)]
pub(super) struct For {
    pub(super) line: u32,
    pub(super) target: Target,
    pub(super) over: Expr,
    pub(super) filter: Option<Expr>,
    pub(super) body: Body,
    pub(super) otherwise: Body,
}

#[derive(Debug)]
pub(in crate::chat) struct Macro {
    pub(super) name: Arc<str>,
    pub(super) parameters: Vec<(Arc<str>, Option<Expr>)>,
    pub(super) body: Body,
}

#[derive(Debug)]
pub(super) enum Target {
    Name(Arc<str>),
    Attribute(Arc<str>, Arc<str>),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(super) enum Expr {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Arc<str>),
    Name(Arc<str>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// A value, and what is asked of it one after the other.
    Path(Box<Expr>, Vec<Step>),
    Not(Box<Expr>),
    Minus(Box<Expr>),
    Plus(Box<Expr>),
    /// Operators of one rank, from the left.
    Chain(Box<Expr>, Vec<(Op, Expr)>),
    Compare(Box<Expr>, Vec<(Compare, Expr)>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    /// Condition, then, else.
    Cond(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

#[derive(Debug)]
pub(super) enum Step {
    Attribute(Arc<str>),
    Index(Expr),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Args),
    Filter(Arc<str>, Args),
    /// Name, arguments, and whether it is to fail.
    Test(Arc<str>, Args, bool),
}

#[derive(Debug, Default)]
pub(super) struct Args {
    pub(super) positional: Vec<Expr>,
    pub(super) named: Vec<(Arc<str>, Expr)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
    Concat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    Equal,
    Unequal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

pub(super) struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: u32,
    loops: u32,
}

impl Parser {
    pub(super) fn new(tokens: Vec<(Token, u32)>) -> Self {
        Self {
            tokens,
            at: 0,
            depth: 0,
            loops: 0,
        }
    }

    pub(super) fn template(mut self) -> Outcome<Body> {
        let (body, end) = self.body(&[])?;
        match end {
            None => Ok(body),
            Some(name) => Err(self.fault(format!("an unexpected {name}"))),
        }
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).map_or(0, |(_, line)| *line)
    }

    fn fault(&self, message: impl Into<String>) -> Fault {
        fault(message).at(self.line())
    }

    fn peek(&self) -> &Token {
        self.tokens
            .get(self.at)
            .map_or(&Token::End, |(token, _)| token)
    }

    fn next(&mut self) -> Token {
        let token = self.tokens.get_mut(self.at);
        self.at += 1;
        token.map_or(Token::End, |(token, _)| mem::replace(token, Token::End))
    }

    fn is(&self, op: &str) -> bool {
        matches!(self.peek(), Token::Op(found) if *found == op)
    }

    fn takes(&mut self, op: &str) -> bool {
        let found = self.is(op);
        self.at += usize::from(found);
        found
    }

    fn need(&mut self, op: &str) -> Outcome<()> {
        if self.takes(op) {
            return Ok(());
        }
        let found = shown(self.peek());
        Err(self.fault(format!("expected {op:?}, found {found}")))
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Token::Name(found) if &**found == word)
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        self.at += usize::from(found);
        found
    }

    fn name(&mut self) -> Outcome<Arc<str>> {
        match self.peek() {
            Token::Name(name) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            other => Err(self.fault(format!("expected a name, found {}", shown(other)))),
        }
    }

    /// Ends a tag.
    fn close(&mut self) -> Outcome<()> {
        match self.peek() {
            Token::CloseTag => {
                self.at += 1;
                Ok(())
            }
            other => {
                let found = shown(other);
                Err(self.fault(format!("expected the end of the tag, found {found}")))
            }
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.depth >= DEPTH {
            return Err(self.fault(format!("nested more than {DEPTH} deep")));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn short<T>(&self, chain: &[T]) -> Outcome<()> {
        if chain.len() >= CHAIN {
            return Err(self.fault(format!("a chain of more than {CHAIN} parts")));
        }
        Ok(())
    }

    /// Nodes up to a tag whose name is one of `ends`, which is taken without its end.
    fn body(&mut self, ends: &[&str]) -> Outcome<(Body, Option<Arc<str>>)> {
        let mut nodes = Vec::new();
        loop {
            match self.next() {
                Token::End => {
                    return match ends.last() {
                        None => Ok((nodes, None)),
                        Some(end) => Err(self.fault(format!("a block without its {end}"))),
                    };
                }
                Token::Text(text) => nodes.push(Node::Text(text)),
                Token::Open => {
                    let line = self.line();
                    nodes.push(Node::Emit(line, self.tuple_or_one()?));
                    match self.next() {
                        Token::Close => {}
                        other => {
                            let found = shown(&other);
                            return Err(self.fault(format!("expected \"}}}}\", found {found}")));
                        }
                    }
                }
                Token::OpenTag => {
                    let name = self.name()?;
                    if ends.contains(&&*name) {
                        return Ok((nodes, Some(name)));
                    }
                    let node = self.deeper(|p| p.tag(&name))?;
                    nodes.push(node);
                }
                other => return Err(self.fault(format!("an unexpected {}", shown(&other)))),
            }
        }
    }

    /// A body up to `end`, whose tag has nothing but (perhaps) the name of its block.
    fn block(&mut self, end: &str) -> Outcome<Body> {
        let (body, _) = self.body(&[end])?;
        if matches!(self.peek(), Token::Name(_)) {
            self.at += 1;
        }
        self.close()?;
        Ok(body)
    }

    fn tag(&mut self, name: &str) -> Outcome<Node> {
        let line = self.line();
        Ok(match name {
            "if" => return self.if_block(line),
            "for" => return self.for_block(line),
            "set" => return self.set(line),
            "macro" => {
                let name = self.name()?;
                self.need("(")?;
                let parameters = self.parameters()?;
                self.close()?;
                let loops = mem::take(&mut self.loops);
                let body = self.block("endmacro");
                self.loops = loops;
                Node::Macro(Arc::new(Macro {
                    name,
                    parameters,
                    body: body?,
                }))
            }
            "call" => {
                let parameters = if self.takes("(") {
                    self.parameters()?
                } else {
                    Vec::new()
                };
                let call = self.expression()?;
                self.close()?;
                let loops = mem::take(&mut self.loops);
                let body = self.block("endcall");
                self.loops = loops;
                let caller = Macro {
                    name: "caller".into(),
                    parameters,
                    body: body?,
                };
                match &call {
                    Expr::Path(_, steps) if matches!(steps.last(), Some(Step::Call(_))) => {}
                    _ => return Err(self.fault("call: expected a call")),
                }
                Node::Call(line, Arc::new(caller), call)
            }
            "filter" => {
                let filters = self.filters()?;
                self.close()?;
                Node::FilterBlock(line, filters, self.block("endfilter")?)
            }
            "with" => {
                let mut pairs = Vec::new();
                while *self.peek() != Token::CloseTag {
                    if !pairs.is_empty() {
                        self.need(",")?;
                    }
                    let target = self.target()?;
                    self.need("=")?;
                    pairs.push((target, self.expression()?));
                }
                self.close()?;
                Node::With(line, pairs, self.block("endwith")?)
            }
            // What the assistant says, which training looks for.
            "generation" => {
                self.close()?;
                Node::Plain(self.block("endgeneration")?)
            }
            // There is one template only, so that nobody overrides it.
            "block" => {
                self.name()?;
                self.close()?;
                Node::Plain(self.block("endblock")?)
            }
            "do" => {
                let value = self.expression()?;
                self.close()?;
                Node::Do(line, value)
            }
            "break" | "continue" => {
                if self.loops == 0 {
                    return Err(self.fault(format!("{name} outside of a loop")));
                }
                self.close()?;
                if name == "break" {
                    Node::Break
                } else {
                    Node::Continue
                }
            }
            "include" | "import" | "from" | "extends" => {
                return Err(self.fault(format!("{name}: there are no other templates")));
            }
            other => return Err(self.fault(format!("there is no tag {other:?}"))),
        })
    }

    fn if_block(&mut self, line: u32) -> Outcome<Node> {
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        let mut condition = Some(self.expression()?);
        loop {
            self.close()?;
            let ends: &[&str] = match condition {
                Some(_) => &["elif", "else", "endif"],
                None => &["endif"],
            };
            let (body, end) = self.body(ends)?;
            match condition.take() {
                Some(condition) => branches.push((condition, body)),
                None => otherwise = body,
            }
            match end.as_deref() {
                Some("elif") => condition = Some(self.expression()?),
                Some("else") => {}
                _ => break,
            }
        }
        self.close()?;
        Ok(Node::If(line, branches, otherwise))
    }

    fn for_block(&mut self, line: u32) -> Outcome<Node> {
        let target = self.target()?;
        if !self.takes_word("in") {
            return Err(self.fault("for: expected \"in\""));
        }
        let mut over = self.or()?;
        if self.takes(",") {
            let mut items = vec![over];
            while !self.is_word("if") && *self.peek() != Token::CloseTag {
                items.push(self.or()?);
                if !self.takes(",") {
                    break;
                }
            }
            over = Expr::Tuple(items);
        }
        let filter = match self.takes_word("if") {
            true => Some(self.expression()?),
            false => None,
        };
        if self.is_word("recursive") {
            return Err(self.fault("recursive loops are not supported; a macro may call itself"));
        }
        self.close()?;
        self.loops += 1;
        let (body, end) = self.body(&["else", "endfor"])?;
        self.loops -= 1;
        self.close()?;
        let otherwise = match end.as_deref() {
            Some("else") => self.block("endfor")?,
            _ => Vec::new(),
        };
        Ok(Node::For(Box::new(For {
            line,
            target,
            over,
            filter,
            body,
            otherwise,
        })))
    }

    fn set(&mut self, line: u32) -> Outcome<Node> {
        let target = self.target()?;
        if self.takes("=") {
            let value = self.tuple_or_one()?;
            self.close()?;
            return Ok(Node::Set(line, target, value));
        }
        let Target::Name(name) = target else {
            return Err(self.fault("set: a block can be given one name"));
        };
        let filters = if self.takes("|") {
            self.filters()?
        } else {
            Vec::new()
        };
        self.close()?;
        Ok(Node::SetBlock(line, name, filters, self.block("endset")?))
    }

    fn target(&mut self) -> Outcome<Target> {
        let first = self.one_target()?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut targets = vec![first];
        while self.takes(",") {
            self.short(&targets)?;
            if !matches!(self.peek(), Token::Name(_)) && !self.is("(") || self.is_word("in") {
                break;
            }
            targets.push(self.one_target()?);
        }
        Ok(Target::Tuple(targets))
    }

    fn one_target(&mut self) -> Outcome<Target> {
        if self.takes("(") {
            let inner = self.deeper(Self::target)?;
            self.need(")")?;
            return Ok(inner);
        }
        let name = self.name()?;
        if self.takes(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        Ok(Target::Name(name))
    }

    fn parameters(&mut self) -> Outcome<Vec<(Arc<str>, Option<Expr>)>> {
        let mut parameters = Vec::new();
        while !self.takes(")") {
            if !parameters.is_empty() {
                self.need(",")?;
                if self.takes(")") {
                    break;
                }
            }
            self.short(&parameters)?;
            let name = self.name()?;
            let default = match self.takes("=") {
                true => Some(self.expression()?),
                false => None,
            };
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    fn filters(&mut self) -> Outcome<Vec<(Arc<str>, Args)>> {
        let mut filters = Vec::new();
        loop {
            self.short(&filters)?;
            let name = self.name()?;
            let args = self.optional_args()?;
            filters.push((name, args));
            if !self.takes("|") {
                return Ok(filters);
            }
        }
    }

    /// One expression, or several with commas between: a tuple.
    fn tuple_or_one(&mut self) -> Outcome<Expr> {
        let first = self.expression()?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.takes(",") {
            if matches!(self.peek(), Token::Close | Token::CloseTag) || self.is(")") {
                break;
            }
            items.push(self.expression()?);
        }
        Ok(Expr::Tuple(items))
    }

    fn expression(&mut self) -> Outcome<Expr> {
        self.deeper(|p| {
            let value = p.or()?;
            if p.takes_word("if") {
                let condition = p.or()?;
                let otherwise = match p.takes_word("else") {
                    true => Some(Box::new(p.expression()?)),
                    false => None,
                };
                return Ok(Expr::Cond(Box::new(condition), Box::new(value), otherwise));
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Outcome<Expr> {
        let first = self.and()?;
        if !self.is_word("or") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.takes_word("or") {
            self.short(&parts)?;
            parts.push(self.and()?);
        }
        Ok(Expr::Or(parts))
    }

    fn and(&mut self) -> Outcome<Expr> {
        let first = self.not()?;
        if !self.is_word("and") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.takes_word("and") {
            self.short(&parts)?;
            parts.push(self.not()?);
        }
        Ok(Expr::And(parts))
    }

    fn not(&mut self) -> Outcome<Expr> {
        if self.takes_word("not") {
            return Ok(Expr::Not(Box::new(self.deeper(Self::not)?)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Outcome<Expr> {
        let first = self.sum()?;
        let mut chain = Vec::new();
        loop {
            let op = match self.peek() {
                Token::Op("==") => Compare::Equal,
                Token::Op("!=") => Compare::Unequal,
                Token::Op("<") => Compare::Less,
                Token::Op("<=") => Compare::LessEqual,
                Token::Op(">") => Compare::Greater,
                Token::Op(">=") => Compare::GreaterEqual,
                Token::Name(name) if &**name == "in" => Compare::In,
                Token::Name(name) if &**name == "not" => {
                    let next = self.tokens.get(self.at + 1).map(|(token, _)| token);
                    match next {
                        Some(Token::Name(name)) if &**name == "in" => {
                            self.at += 1;
                            Compare::NotIn
                        }
                        _ => break,
                    }
                }
                _ => break,
            };
            self.at += 1;
            self.short(&chain)?;
            chain.push((op, self.sum()?));
        }
        Ok(match chain.is_empty() {
            true => first,
            false => Expr::Compare(Box::new(first), chain),
        })
    }

    /// Operators of one rank, from the left.
    fn chain(
        &mut self,
        operators: &[(&str, Op)],
        operand: fn(&mut Self) -> Outcome<Expr>,
    ) -> Outcome<Expr> {
        let first = operand(self)?;
        let mut chain = Vec::new();
        loop {
            let found = match self.peek() {
                Token::Op(op) => operators.iter().find(|(text, _)| text == op),
                _ => None,
            };
            let Some((_, op)) = found else { break };
            self.at += 1;
            self.short(&chain)?;
            chain.push((*op, operand(self)?));
        }
        Ok(match chain.is_empty() {
            true => first,
            false => Expr::Chain(Box::new(first), chain),
        })
    }

    fn sum(&mut self) -> Outcome<Expr> {
        self.chain(&[("+", Op::Add), ("-", Op::Subtract)], |p| {
            p.chain(&[("~", Op::Concat)], Self::product)
        })
    }

    fn product(&mut self) -> Outcome<Expr> {
        let operators = [
            ("*", Op::Multiply),
            ("/", Op::Divide),
            ("//", Op::FloorDivide),
            ("%", Op::Remainder),
        ];
        self.chain(&operators, |p| {
            p.chain(&[("**", Op::Power)], |p| p.unary(true))
        })
    }

    fn unary(&mut self, filters: bool) -> Outcome<Expr> {
        if self.takes("-") {
            let inner = self.deeper(|p| p.unary(false))?;
            return self.path(Expr::Minus(Box::new(inner)), filters);
        }
        if self.takes("+") {
            let inner = self.deeper(|p| p.unary(false))?;
            return self.path(Expr::Plus(Box::new(inner)), filters);
        }
        let first = self.primary()?;
        self.path(first, filters)
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let line = self.line();
        Ok(match self.next() {
            Token::Name(name) => match &*name {
                "true" | "True" => Expr::Bool(true),
                "false" | "False" => Expr::Bool(false),
                "none" | "None" => Expr::None,
                "and" | "or" | "in" | "is" | "if" | "else" | "not" => {
                    return Err(fault(format!("expected a value, found {name:?}")).at(line));
                }
                _ => Expr::Name(name),
            },
            Token::Str(mut text) => {
                while let Token::Str(more) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Expr::Str(text.into())
            }
            Token::Int(n) => Expr::Int(n),
            Token::Float(x) => Expr::Float(x),
            Token::Op("(") => {
                let inner = self.deeper(|p| {
                    if p.is(")") {
                        return Ok(Expr::Tuple(Vec::new()));
                    }
                    p.tuple_or_one()
                })?;
                self.need(")")?;
                inner
            }
            Token::Op("[") => {
                let mut items = Vec::new();
                while !self.takes("]") {
                    if !items.is_empty() {
                        self.need(",")?;
                        if self.takes("]") {
                            break;
                        }
                    }
                    items.push(self.expression()?);
                }
                Expr::List(items)
            }
            Token::Op("{") => {
                let mut entries = Vec::new();
                while !self.takes("}") {
                    if !entries.is_empty() {
                        self.need(",")?;
                        if self.takes("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.need(":")?;
                    entries.push((key, self.expression()?));
                }
                Expr::Dict(entries)
            }
            other => {
                let found = shown(&other);
                return Err(fault(format!("expected a value, found {found}")).at(line));
            }
        })
    }

    /// Attributes, indices and calls; with `filters`, those and tests, too.
    fn path(&mut self, first: Expr, filters: bool) -> Outcome<Expr> {
        let mut steps = Vec::new();
        loop {
            self.short(&steps)?;
            if self.takes(".") {
                match self.next() {
                    Token::Name(name) => steps.push(Step::Attribute(name)),
                    Token::Int(n) => steps.push(Step::Index(Expr::Int(n))),
                    other => {
                        let found = shown(&other);
                        return Err(self.fault(format!("expected an attribute, found {found}")));
                    }
                }
            } else if self.takes("[") {
                let step = self.deeper(Self::subscript)?;
                steps.push(step);
            } else if self.is("(") {
                let args = self.optional_args()?;
                steps.push(Step::Call(args));
            } else if filters && self.takes("|") {
                let name = self.name()?;
                steps.push(Step::Filter(name, self.optional_args()?));
            } else if filters && self.takes_word("is") {
                let fails = self.takes_word("not");
                let name = self.name()?;
                let args = self.test_args()?;
                steps.push(Step::Test(name, args, fails));
            } else {
                break;
            }
        }
        Ok(match steps.is_empty() {
            true => first,
            false => Expr::Path(Box::new(first), steps),
        })
    }

    fn subscript(&mut self) -> Outcome<Step> {
        let mut parts: Vec<Option<Expr>> = Vec::new();
        loop {
            let part = match self.is(":") || self.is("]") {
                true => None,
                false => Some(self.tuple_or_one()?),
            };
            parts.push(part);
            if parts.len() == 3 || !self.takes(":") {
                break;
            }
        }
        self.need("]")?;
        let sliced = parts.len() > 1;
        let mut parts = parts.into_iter();
        if sliced {
            let mut part = || parts.next().flatten();
            return Ok(Step::Slice(Box::new([part(), part(), part()])));
        }
        match parts.next().flatten() {
            Some(index) => Ok(Step::Index(index)),
            None => Err(self.fault("an empty index")),
        }
    }

    /// Arguments between parentheses, if there are any.
    fn optional_args(&mut self) -> Outcome<Args> {
        if !self.takes("(") {
            return Ok(Args::default());
        }
        self.deeper(|p| {
            let mut args = Args::default();
            let mut first = true;
            while !p.takes(")") {
                if !first {
                    p.need(",")?;
                    if p.takes(")") {
                        break;
                    }
                }
                first = false;
                p.short(&args.positional)?;
                p.short(&args.named)?;
                if p.is("*") || p.is("**") {
                    return Err(p.fault("arguments in lists are not supported"));
                }
                let named = matches!(
                    p.tokens.get(p.at + 1).map(|(token, _)| token),
                    Some(Token::Op("="))
                );
                if named && matches!(p.peek(), Token::Name(_)) {
                    let name = p.name()?;
                    p.need("=")?;
                    args.named.push((name, p.expression()?));
                } else if args.named.is_empty() {
                    args.positional.push(p.expression()?);
                } else {
                    return Err(p.fault("an argument without a name after one with a name"));
                }
            }
            Ok(args)
        })
    }

    /// What a test compares with: in parentheses, or one value after its name.
    fn test_args(&mut self) -> Outcome<Args> {
        let value = match self.peek() {
            Token::Op("(") => return self.optional_args(),
            Token::Name(name) => {
                !matches!(&**name, "else" | "or" | "and" | "is" | "if" | "not" | "in")
            }
            Token::Str(_) | Token::Int(_) | Token::Float(_) => true,
            Token::Op("[" | "{") => true,
            _ => false,
        };
        let mut args = Args::default();
        if value {
            let first = self.deeper(Self::primary)?;
            args.positional.push(self.path(first, false)?);
        }
        Ok(args)
    }
}

fn shown(token: &Token) -> String {
    match token {
        Token::Text(_) => "text".into(),
        Token::Open => "\"{{\"".into(),
        Token::Close => "\"}}\"".into(),
        Token::OpenTag => "\"{%\"".into(),
        Token::CloseTag => "\"%}\"".into(),
        Token::Name(name) => format!("{:?}", &**name),
        Token::Str(_) => "a string".into(),
        Token::Int(_) | Token::Float(_) => "a number".into(),
        Token::Op(op) => format!("{op:?}"),
        Token::End => "the end".into(),
    }
}
